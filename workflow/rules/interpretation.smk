# interpretation/{study}: where latents fire, what that may mean, and how well that explanation does on held-out text.


rule interpret:
    input:
        comparison="results/comparison/{study}/manifest.json",
        latents=ancient("results/comparison/{study}/latents.parquet"),
        dictionaries=lambda wildcards: dictionary_files(wildcards.study),
        stores=lambda wildcards: store_files(wildcards.study),
        model=lambda wildcards: policy_files(CONFIG.studies[wildcards.study].model),
    output:
        latents="results/interpretation/{study}/latents.parquet",
        explanations="results/interpretation/{study}/explanations.parquet",
        examples="results/interpretation/{study}/examples.parquet",
        manifest=ensure("results/interpretation/{study}/manifest.json", non_empty=True),
    log:
        "logs/interpretation/{study}.log",
    benchmark:
        "benchmarks/interpretation/{study}.tsv"
    conda:
        "../../envs/rlsae.yaml"
    threads: 4
    resources:
        mem_mb=8000,
        runtime=240,
    params:
        settings=settings(LAYOUT.interpretation_settings, "study"),
        code=code_digest("interpretation"),
        dictionaries=dictionary_options,
        stores=store_options,
        model=lambda wildcards: policy_folder(CONFIG.studies[wildcards.study].model),
    shell:
        "python -m rlsae interpret --settings {params.settings:q} --comparison results/comparison/{wildcards.study}"
        " {params.dictionaries} {params.stores} --model {params.model} --threads {threads}"
        " --out results/interpretation/{wildcards.study} --work results/.work/interpretation/{wildcards.study} >> {log} 2>&1"
