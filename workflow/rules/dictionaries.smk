# dictionaries/{policy}.{corpus}/{activation}/{kind}/layer{layer}/{dictionary}: the sparse autoencoders of one policy × layer
# × recipe, all seeds of the recipe in one job.
from rlsae.config import ExternalDictionary


def dictionary_source(wildcards):
    """The folder of an external autoencoder."""
    entry = CONFIG.dictionaries[wildcards.dictionary]
    if not isinstance(entry, ExternalDictionary):
        return None
    return entry.path.format(layer=wildcards.layer, policy=wildcards.policy)


def dictionary_source_files(wildcards):
    folder = dictionary_source(wildcards)
    return sorted(str(path) for path in Path(folder).glob("*") if path.is_file()) or [folder] if folder else []


def dictionary_start(wildcards):
    """The dictionaries of the base policy that this one continues; both policies start from them."""
    continues = getattr(CONFIG.dictionaries[wildcards.dictionary], "continues", None)
    if continues is None:
        return None
    rows = f"{model_of(wildcards.policy)}.{wildcards.corpus}/{wildcards.activation}/{wildcards.kind}"
    return f"results/dictionaries/{rows}/layer{wildcards.layer}/{continues}"


def dictionary_start_files(wildcards):
    folder = dictionary_start(wildcards)
    return [f"{folder}/manifest.json", ancient(f"{folder}/saes")] if folder else []


rule dictionary:
    input:
        activations=lambda wildcards: [
            "results/activations/{policy}.{corpus}/{activation}/{kind}/manifest.json",
            ancient("results/activations/{policy}.{corpus}/{activation}/{kind}/store"),
        ],
        policy=lambda wildcards: policy_files(wildcards.policy),
        tokens=tokens_of_policy,
        start=dictionary_start_files,
        source=dictionary_source_files,
    output:
        saes=directory("results/dictionaries/{policy}.{corpus}/{activation}/{kind}/layer{layer}/{dictionary}/saes"),
        metrics="results/dictionaries/{policy}.{corpus}/{activation}/{kind}/layer{layer}/{dictionary}/metrics.parquet",
        manifest=ensure(
            "results/dictionaries/{policy}.{corpus}/{activation}/{kind}/layer{layer}/{dictionary}/manifest.json",
            non_empty=True,
        ),
    log:
        "logs/dictionaries/{policy}.{corpus}/{activation}/{kind}/layer{layer}/{dictionary}.log",
    benchmark:
        "benchmarks/dictionaries/{policy}.{corpus}/{activation}/{kind}/layer{layer}/{dictionary}.tsv"
    conda:
        "../../envs/rlsae.yaml"
    threads: 4
    resources:
        mem_mb=8000,
        runtime=720,
    params:
        settings=settings(LAYOUT.dictionary_settings, "dictionary"),
        code=code_digest("sae"),
        activations="results/activations/{policy}.{corpus}/{activation}/{kind}",
        weights=lambda wildcards: weights_folder(wildcards.policy),
        options=lambda wildcards: " ".join(
            [option("start", dictionary_start(wildcards)), option("source", dictionary_source(wildcards))]
        ),
        tokens=lambda wildcards: f"results/tokens/{model_of(wildcards.policy)}.{wildcards.corpus}",
        work="results/.work/dictionaries/{policy}.{corpus}/{activation}/{kind}/layer{layer}/{dictionary}",
    shell:
        "python -m rlsae dictionary --settings {params.settings:q} --layer {wildcards.layer}"
        " --activations {params.activations} --weights {params.weights} --tokens {params.tokens} {params.options}"
        " --threads {threads}"
        " --out $(dirname {output.manifest}) --work {params.work} >> {log} 2>&1"
