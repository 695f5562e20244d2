# interpretation/{study}: what latents mean, and what becomes of the reward when they are changed.


rule interpret:
    input:
        comparison="results/comparison/{study}/manifest.json",
        tables=ancient(expand("results/comparison/{{study}}/{table}.parquet", table=["latents", "levels"])),
        dictionaries=lambda wildcards: dictionary_files(wildcards.study),
        stores=lambda wildcards: store_files(wildcards.study),
        policies=lambda wildcards: [file for policy in roles(wildcards.study).values() for file in policy_files(policy)],
        corpus=lambda wildcards: corpus_files(prompts_of(wildcards.study)),
        reward=lambda wildcards: source_files(reward_of_study(wildcards.study)),
        llm=lambda wildcards: source_files(llm_of_study(wildcards.study)),
        triples=lambda wildcards: source_files(probes_of_study(wildcards.study)),
    output:
        tables=expand(
            "results/interpretation/{{study}}/{table}.parquet",
            table=[
                "latents",
                "explanations",
                "examples",
                "reward_links",
                "map_directions",
                "ablations",
                "steering",
                "transplants",
                "probe_triples",
                "probes",
                "probe_predictions",
                "probe_overlap",
                "probe_components",
            ],
        ),
        summary="results/interpretation/{study}/summary.json",
        manifest=ensure("results/interpretation/{study}/manifest.json", non_empty=True),
    log:
        "logs/interpretation/{study}.log",
    benchmark:
        "benchmarks/interpretation/{study}.tsv"
    conda:
        "../../envs/rlsae.yaml"
    threads: 4
    resources:
        gpu=0,
        mem_mb=8000,
        runtime=240,
    params:
        settings=settings(LAYOUT.interpretation_settings, "study"),
        code=code_digest("interpretation"),
        dictionaries=dictionary_options,
        stores=store_options,
        policies=interpretation_policies,
    shell:
        "python -m rlsae interpret --settings {params.settings:q} --comparison results/comparison/{wildcards.study}"
        " {params.dictionaries} {params.stores} {params.policies} --threads {threads} --gpus {resources.gpu}"
        " --llm-answers results/.llm-answers --out results/interpretation/{wildcards.study} --work results/.work/interpretation/{wildcards.study} >> {log} 2>&1"
