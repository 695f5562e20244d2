# divergence/{study}: how far each layer moved, and the layers that the study looks into. A checkpoint because a measured
# choice is known only afterwards; studies that name their layers never ask it.


checkpoint rank_layers:
    input:
        policies=lambda wildcards: [file for policy in roles(wildcards.study).values() for file in policy_files(policy)],
        surveys=lambda wildcards: base_and_tuned_files(wildcards.study, SURVEY),
        same_as=lambda wildcards: (f"{same_as(wildcards.study)}/manifest.json" if same_as(wildcards.study) else []),
    output:
        layers="results/divergence/{study}/layers.parquet",
        table=report(
            "results/divergence/{study}/layers.tsv",
            category="Layers",
            caption="../report/divergence.rst",
            labels={"study": "{study}"},
        ),
        chosen="results/divergence/{study}/chosen.json",
        manifest=ensure("results/divergence/{study}/manifest.json", non_empty=True),
    log:
        "logs/divergence/{study}.log",
    benchmark:
        "benchmarks/divergence/{study}.tsv"
    conda:
        "../../envs/rlsae.yaml"
    threads: 1
    resources:
        mem_mb=8000,
        runtime=120,
    params:
        settings=settings(LAYOUT.divergence_settings, "study"),
        code=code_digest("divergence"),
        base=divergence_option("base"),
        tuned=divergence_option("tuned"),
        same_as=lambda wildcards: option("same-as", same_as(wildcards.study)),
    shell:
        "python -m rlsae divergence --settings {params.settings:q} {params.base} {params.tuned} {params.same_as}"
        " --out results/divergence/{wildcards.study} --work results/.work/divergence/{wildcards.study} >> {log} 2>&1"
