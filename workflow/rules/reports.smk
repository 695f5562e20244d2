# reports/{study}: pages that open from disk; reports/index.html: all studies side by side.


rule report_study:
    input:
        policies=lambda wildcards: [file for policy in roles(wildcards.study).values() for file in policy_files(policy)],
        divergence="results/divergence/{study}/manifest.json",
        comparison="results/comparison/{study}/manifest.json",
        interpretation="results/interpretation/{study}/manifest.json",
        dictionaries=lambda wildcards: dictionary_files(wildcards.study),
        stores=lambda wildcards: store_files(wildcards.study),
    output:
        index=report(
            "results/reports/{study}/index.html",
            category="Studies",
            caption="../report/study.rst",
            labels={"study": "{study}"},
        ),
        latents=report(
            "results/reports/{study}/latents.html",
            category="Studies",
            caption="../report/study.rst",
            labels={"study": "{study}, latents"},
        ),
        manifest=ensure("results/reports/{study}/manifest.json", non_empty=True),
    log:
        "logs/reports/{study}.log",
    benchmark:
        "benchmarks/reports/{study}.tsv"
    conda:
        "../../envs/rlsae.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        code=code_digest("report"),
    shell:
        "python -m rlsae report {wildcards.study} --work results/.work/reports/{wildcards.study} >> {log} 2>&1"


rule report_studies:
    input:
        expand("results/reports/{study}/manifest.json", study=CONFIG.studies),
    output:
        report(
            "results/reports/index.html",
            category="Studies",
            caption="../report/studies.rst",
            labels={"study": "all, side by side"},
        ),
    log:
        "logs/reports/index.log",
    localrule: True
    conda:
        "../../envs/rlsae.yaml"
    params:
        code=code_digest("report"),
        studies=list(CONFIG.studies),
    shell:
        "python -m rlsae report-studies {params.studies} >> {log} 2>&1"
