# policies/{model}.{tuning}: a tuned model with its checkpoints, history and evaluation.


rule tune:
    input:
        base=lambda wildcards: policy_files(wildcards.model),
        corpus=tuning_corpus,
        reward=reward_files,
        external=external_files,
    output:
        model=directory("results/policies/{model}.{tuning}/model"),
        checkpoints=directory("results/policies/{model}.{tuning}/checkpoints"),
        history="results/policies/{model}.{tuning}/history.parquet",
        samples="results/policies/{model}.{tuning}/samples.parquet",
        manifest=ensure("results/policies/{model}.{tuning}/manifest.json", non_empty=True),
    log:
        "logs/policies/{model}.{tuning}.log",
    benchmark:
        "benchmarks/policies/{model}.{tuning}.tsv"
    conda:
        "../../envs/rlsae.yaml"
    threads: 8
    resources:
        gpu=0,
        mem_mb=16000,
        runtime=1440,
    params:
        settings=settings(LAYOUT.policy_settings, "tuning"),
        code=code_digest("tuning"),
        corpus=lambda wildcards: f"results/corpora/{CONFIG.tunings[wildcards.tuning].corpus}",
        files=tuning_options,
    shell:
        "python -m rlsae tune --settings {params.settings:q} --base results/models/{wildcards.model}"
        " --corpus {params.corpus} {params.files} --threads {threads} --gpus {resources.gpu}"
        " --out results/policies/{wildcards.model}.{wildcards.tuning}"
        " --work results/.work/policies/{wildcards.model}.{wildcards.tuning} >> {log} 2>&1"
