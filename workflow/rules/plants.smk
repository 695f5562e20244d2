# plants/{method}/{variation}/documents{n}/seed{n}: how well the comparison finds changes that are known, whatever
# the configuration: `snakemake plants`. plants/curves: all of them together.


rule plants:
    input:
        "results/plants/curves/manifest.json",
    localrule: True


rule plant_curves:
    input:
        expand("results/plants/{trial.path}/manifest.json", trial=all_trials()),
    output:
        scores="results/plants/curves/scores.parquet",
        summary="results/plants/curves/summary.tsv",
        effects="results/plants/curves/effects.tsv",
        densities="results/plants/curves/densities.tsv",
        methods="results/plants/curves/methods.tsv",
        figures=directory("results/plants/curves/figures"),
        manifest=ensure("results/plants/curves/manifest.json", non_empty=True),
    log:
        "logs/plants/curves.log",
    conda:
        "../../envs/rlsae.yaml"
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        trials=[f"results/plants/{trial.path}" for trial in all_trials()],
        code=code_digest("plants.curves"),
    shell:
        "python -m rlsae plant-curves {params.trials:q} --out results/plants/curves --work results/.work/plants/curves > {log} 2>&1"


rule plant_trial:
    output:
        scores="results/plants/{method}/{variation}/documents{documents}/seed{seed}/scores.parquet",
        directions="results/plants/{method}/{variation}/documents{documents}/seed{seed}/directions.parquet",
        manifest=ensure("results/plants/{method}/{variation}/documents{documents}/seed{seed}/manifest.json", non_empty=True),
    log:
        "logs/plants/{method}/{variation}/documents{documents}/seed{seed}.log",
    benchmark:
        "benchmarks/plants/{method}/{variation}/documents{documents}/seed{seed}.tsv"
    conda:
        "../../envs/rlsae.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=4000,
        runtime=60,
    params:
        settings=plant_settings,
        code=code_digest("plants.trial"),
    shell:
        "python -m rlsae plant-trial --settings {params.settings:q} --threads {threads} --gpus {resources.gpu}"
        " --out results/plants/{wildcards.method}/{wildcards.variation}/documents{wildcards.documents}/seed{wildcards.seed}"
        " --work results/.work/plants/{wildcards.method}/{wildcards.variation}/documents{wildcards.documents}/seed{wildcards.seed}"
        " >> {log} 2>&1"
