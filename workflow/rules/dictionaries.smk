# dictionaries/{policy}.{corpus}/{activation}/{kind}/layer{layer}/{dictionary}: the sparse autoencoders of one policy × layer
# × recipe, all seeds of the recipe in one job.


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
        base=base_files,
    output:
        saes=directory("results/dictionaries/{policy}.{corpus}/{activation}/{kind}/layer{layer}/{dictionary}/saes"),
        metrics="results/dictionaries/{policy}.{corpus}/{activation}/{kind}/layer{layer}/{dictionary}/metrics.parquet",
        figures=report(
            directory("results/dictionaries/{policy}.{corpus}/{activation}/{kind}/layer{layer}/{dictionary}/figures"),
            patterns=["{figure}.svg"],
            category="Dictionaries",
            caption="../report/dictionary_figures.rst",
            labels={"policy": "{policy}", "layer": "{layer}", "dictionary": "{dictionary}"},
        ),
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
        gpu=0,
        mem_mb=8000,
        runtime=720,
    params:
        settings=settings(LAYOUT.dictionary_settings, "dictionary"),
        code=code_digest("sae"),
        activations="results/activations/{policy}.{corpus}/{activation}/{kind}",
        weights=lambda wildcards: weights_folder(wildcards.policy),
        options=dictionary_sources,
        tokens=lambda wildcards: f"results/tokens/{model_of(wildcards.policy)}.{wildcards.corpus}",
        work="results/.work/dictionaries/{policy}.{corpus}/{activation}/{kind}/layer{layer}/{dictionary}",
    shell:
        "python -m rlsae dictionary --settings {params.settings:q} --layer {wildcards.layer}"
        " --activations {params.activations} --weights {params.weights} --tokens {params.tokens} {params.options}"
        " --threads {threads} --gpus {resources.gpu}"
        " --out $(dirname {output.manifest}) --work {params.work} >> {log} 2>&1"
