# comparison/{study}: which latents changed between base and tuned, and how alike their dictionaries are.


rule compare:
    input:
        dictionaries=lambda wildcards: dictionary_files(wildcards.study),
        stores=lambda wildcards: store_files(wildcards.study),
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
        mem_mb=8000,
        runtime=240,
    params:
        settings=settings(LAYOUT.comparison_settings, "study"),
        code=code_digest("comparison"),
        dictionaries=dictionary_options,
        stores=store_options,
    shell:
        "python -m rlsae compare --settings {params.settings:q} {params.dictionaries} {params.stores} --threads {threads}"
        " --out results/comparison/{wildcards.study} --work results/.work/comparison/{wildcards.study} >> {log} 2>&1"
