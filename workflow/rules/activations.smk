# tokens/{model}.{corpus}: a corpus through the model's tokenizer, once for base and tuned.
# activations/{policy}.{corpus}/{activation}/{kind}: what each layer makes of these tokens. A dump is cut into parts, whose
# number follows from the configuration; their stamps are temporary, so that a deleted store brings its parts back.


rule tokens:
    input:
        model=lambda wildcards: policy_files(wildcards.model),
        corpus=lambda wildcards: corpus_files(wildcards.corpus),
    output:
        store=directory("results/tokens/{model}.{corpus}/store"),
        manifest=ensure("results/tokens/{model}.{corpus}/manifest.json", non_empty=True),
    log:
        "logs/tokens/{model}.{corpus}.log",
    benchmark:
        "benchmarks/tokens/{model}.{corpus}.tsv"
    conda:
        "../../envs/rlsae.yaml"
    threads: 2
    resources:
        mem_mb=8000,
        runtime=120,
    params:
        settings=settings(LAYOUT.token_settings, "corpus"),
        code=code_digest("activations.tokens"),
    shell:
        "python -m rlsae tokens --settings {params.settings:q} --model results/models/{wildcards.model}"
        " --corpus results/corpora/{wildcards.corpus} --out results/tokens/{wildcards.model}.{wildcards.corpus}"
        " --work results/.work/tokens/{wildcards.model}.{wildcards.corpus} >> {log} 2>&1"


rule activation_part:
    input:
        policy=lambda wildcards: policy_files(wildcards.policy),
        tokens=tokens_of_policy,
    output:
        stamp=temp("results/activations/{policy}.{corpus}/{activation}/{kind}/part-{part}.json"),
    log:
        "logs/activations/{policy}.{corpus}/{activation}/{kind}/part-{part}.log",
    benchmark:
        "benchmarks/activations/{policy}.{corpus}/{activation}/{kind}/part-{part}.tsv"
    conda:
        "../../envs/rlsae.yaml"
    threads: 4
    resources:
        gpu=0,
        mem_mb=8000,
        runtime=240,
        disk_mb=lambda wildcards: LAYOUT.part_megabytes(wildcards.activation, wildcards.kind, wildcards.policy),
    params:
        settings=settings(LAYOUT.activation_settings, "activation", "kind", "policy"),
        code=code_digest("activations", "models"),
        policy=lambda wildcards: policy_folder(wildcards.policy),
        weights=lambda wildcards: weights_folder(wildcards.policy),
        tokens=lambda wildcards: f"results/tokens/{model_of(wildcards.policy)}.{wildcards.corpus}",
        work="results/.work/activations/{policy}.{corpus}/{activation}/{kind}",
    shell:
        "python -m rlsae extract --settings {params.settings:q} --part {wildcards.part} --stamp {output.stamp}"
        " --policy {params.policy} --weights {params.weights} --tokens {params.tokens} --work {params.work}"
        " --threads {threads} --gpus {resources.gpu} >> {log} 2>&1"


rule activation_store:
    input:
        parts=activation_parts,
        policy=lambda wildcards: policy_files(wildcards.policy),
        tokens=tokens_of_policy,
    output:
        store=directory("results/activations/{policy}.{corpus}/{activation}/{kind}/store"),
        manifest=ensure(
            "results/activations/{policy}.{corpus}/{activation}/{kind}/manifest.json",
            non_empty=True,
        ),
    log:
        "logs/activations/{policy}.{corpus}/{activation}/{kind}/store.log",
    benchmark:
        "benchmarks/activations/{policy}.{corpus}/{activation}/{kind}/store.tsv"
    wildcard_constraints:
        activation=one_of(name for name, entry in CONFIG.activations.items() if entry.keep),
    conda:
        "../../envs/rlsae.yaml"
    threads: 1
    resources:
        mem_mb=8000,
        runtime=240,
    params:
        settings=settings(LAYOUT.activation_settings, "activation", "kind", "policy"),
        code=code_digest("activations", "models"),
        policy=lambda wildcards: policy_folder(wildcards.policy),
        tokens=lambda wildcards: f"results/tokens/{model_of(wildcards.policy)}.{wildcards.corpus}",
        work="results/.work/activations/{policy}.{corpus}/{activation}/{kind}",
        stamps=lambda wildcards, input: " ".join(f"--stamp {stamp}" for stamp in input.parts),
    shell:
        "python -m rlsae consolidate --settings {params.settings:q} --policy {params.policy} --tokens {params.tokens}"
        " --work {params.work} --out $(dirname {output.manifest}) {params.stamps} >> {log} 2>&1"


# The same for `keep: false`: the store goes once everything made from it is done.
use rule activation_store as activation_store_temporary with:
    output:
        store=temp(directory("results/activations/{policy}.{corpus}/{activation}/{kind}/store")),
        manifest=ensure("results/activations/{policy}.{corpus}/{activation}/{kind}/manifest.json", non_empty=True),
    wildcard_constraints:
        activation=one_of(name for name, entry in CONFIG.activations.items() if not entry.keep),
