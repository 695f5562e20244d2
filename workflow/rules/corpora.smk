# corpora/{corpus}: documents or preference pairs, generated or read, with the held-out ones marked.


rule corpus:
    input:
        source=corpus_source,
    output:
        documents="results/corpora/{corpus}/documents.parquet",
        manifest=ensure("results/corpora/{corpus}/manifest.json", non_empty=True),
    log:
        "logs/corpora/{corpus}.log",
    benchmark:
        "benchmarks/corpora/{corpus}.tsv"
    wildcard_constraints:
        corpus=corpora_of_kind("documents"),
    conda:
        "../../envs/rlsae.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=120,
    params:
        settings=settings(LAYOUT.corpus_settings, "corpus"),
        code=code_digest("corpora"),
        source=lambda wildcards, input: option("source", input.source),
    shell:
        "python -m rlsae corpus --settings {params.settings:q} {params.source}"
        " --out results/corpora/{wildcards.corpus} --work results/.work/corpora/{wildcards.corpus} >> {log} 2>&1"


use rule corpus as preferences with:
    output:
        pairs="results/corpora/{corpus}/pairs.parquet",
        manifest=ensure("results/corpora/{corpus}/manifest.json", non_empty=True),
    wildcard_constraints:
        corpus=corpora_of_kind("preferences"),
