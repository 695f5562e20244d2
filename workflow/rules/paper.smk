# paper: tables and figures of arXiv 2310.08164 from every study in the results, whatever the configuration:
# `snakemake paper_tables`.


rule paper_tables:
    output:
        "results/paper/tables.md",
        manifest=ensure("results/paper/manifest.json", non_empty=True),
    log:
        "logs/paper/tables.log",
    conda:
        "../../envs/rlsae.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        studies=finished_studies,
        code=code_digest("paper"),
    shell:
        "python -m rlsae paper-tables --work results/.work/paper >> {log} 2>&1"
