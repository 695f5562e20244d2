# One target per stage: `snakemake policies`. Each names everything upstream too.


localrules:
    corpora,
    models,
    policies,
    activations,
    divergence,
    dictionaries,
    comparison,
    interpretation,
    reports,


rule corpora:
    input:
        targets("corpora"),


rule models:
    input:
        targets("models"),


rule policies:
    input:
        targets("policies"),


rule activations:
    input:
        targets("activations"),


rule divergence:
    input:
        targets("divergence"),


rule dictionaries:
    input:
        targets("dictionaries"),


rule comparison:
    input:
        targets("comparison"),


rule interpretation:
    input:
        targets("interpretation"),


rule reports:
    input:
        targets("reports"),
