# comparison/{study}: which latents changed between base and tuned, how alike their dictionaries are, and
# what each is worth to the other model.


rule compare:
    input:
        dictionaries=lambda wildcards: dictionary_files(wildcards.study),
        stores=lambda wildcards: store_files(wildcards.study),
        policies=lambda wildcards: [file for policy in roles(wildcards.study).values() for file in policy_files(policy)],
        tokens=lambda wildcards: token_files(CONFIG.studies[wildcards.study].model, CONFIG.studies[wildcards.study].corpus),
    output:
        latents="results/comparison/{study}/latents.parquet",
        levels="results/comparison/{study}/levels.parquet",
        aggregates="results/comparison/{study}/aggregates.parquet",
        floor="results/comparison/{study}/floor.parquet",
        manifest=ensure("results/comparison/{study}/manifest.json", non_empty=True),
    log:
        "logs/comparison/{study}.log",
    benchmark:
        "benchmarks/comparison/{study}.tsv"
    conda:
        "../../envs/rlsae.yaml"
    threads: 4
    resources:
        gpu=0,
        mem_mb=8000,
        runtime=240,
    params:
        settings=settings(LAYOUT.comparison_settings, "study"),
        code=code_digest("comparison"),
        dictionaries=dictionary_options,
        stores=store_options,
        models=models_and_tokens,
    shell:
        "python -m rlsae compare --settings {params.settings:q} {params.dictionaries} {params.stores} {params.models}"
        " --threads {threads} --gpus {resources.gpu}"
        " --out results/comparison/{wildcards.study} --work results/.work/comparison/{wildcards.study} >> {log} 2>&1"
