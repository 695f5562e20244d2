# models/{model}: a base model as a transformers folder, pretrained here, copied, or taken from the hub.


rule model:
    input:
        corpus=model_corpus,
        source=model_source,
    output:
        model=directory("results/models/{model}/model"),
        manifest=ensure("results/models/{model}/manifest.json", non_empty=True),
    log:
        "logs/models/{model}.log",
    benchmark:
        "benchmarks/models/{model}.tsv"
    conda:
        "../../envs/rlsae.yaml"
    threads: 8
    resources:
        gpu=0,
        mem_mb=8000,
        runtime=240,
    params:
        settings=settings(LAYOUT.model_settings, "model"),
        code=code_digest("models", "pretrain"),
        options=model_options,
    shell:
        "python -m rlsae model --settings {params.settings:q} {params.options} --threads {threads} --gpus {resources.gpu}"
        " --out results/models/{wildcards.model} --work results/.work/models/{wildcards.model} >> {log} 2>&1"
