# divergence/{study}: how far each layer moved, and the layers that the study looks into. A checkpoint because a measured
# choice is known only afterwards; studies that name their layers never ask it.


checkpoint rank_layers:
    input:
        policies=lambda wildcards: [file for policy in surveyed(wildcards.study) for file in policy_files(policy)],
        surveys=lambda wildcards: survey_files(wildcards.study),
        tokens=lambda wildcards: token_files(CONFIG.studies[wildcards.study].model, CONFIG.studies[wildcards.study].corpus),
        corpus=lambda wildcards: corpus_files(prompts_of(wildcards.study)),
        reward=lambda wildcards: source_files(reward_of_study(wildcards.study)),
        same_as=lambda wildcards: (f"{same_as(wildcards.study)}/manifest.json" if same_as(wildcards.study) else []),
    output:
        layers="results/divergence/{study}/layers.parquet",
        table=report(
            "results/divergence/{study}/layers.tsv",
            category="Layers",
            caption="../report/divergence.rst",
            labels={"study": "{study}"},
        ),
        steps="results/divergence/{study}/steps.parquet",
        steps_table="results/divergence/{study}/steps.tsv",
        agreement="results/divergence/{study}/agreement.tsv",
        figures=report(
            directory("results/divergence/{study}/figures"),
            patterns=["{figure}.svg"],
            category="Layers",
            caption="../report/divergence_figures.rst",
            labels={"study": "{study}", "figure": "{figure}"},
        ),
        chosen="results/divergence/{study}/chosen.json",
        manifest=ensure("results/divergence/{study}/manifest.json", non_empty=True),
    log:
        "logs/divergence/{study}.log",
    benchmark:
        "benchmarks/divergence/{study}.tsv"
    conda:
        "../../envs/rlsae.yaml"
    threads: 2
    resources:
        gpu=0,
        mem_mb=8000,
        runtime=240,
    params:
        settings=settings(LAYOUT.divergence_settings, "study"),
        code=code_digest("divergence"),
        base=divergence_option("base"),
        tuned=divergence_option("tuned"),
        sample=divergence_sample,
        checkpoints=divergence_checkpoints,
        same_as=lambda wildcards: option("same-as", same_as(wildcards.study)),
    shell:
        "python -m rlsae divergence --settings {params.settings:q} {params.base} {params.tuned} {params.sample}"
        " {params.checkpoints} {params.same_as} --threads {threads} --gpus {resources.gpu}"
        " --out results/divergence/{wildcards.study} --work results/.work/divergence/{wildcards.study} >> {log} 2>&1"
