# What did this tuning change inside my language model, and how sure are we?
#
# `snakemake --cores all` runs every study of config.yaml; `--configfile mine.yaml` runs another configuration instead.
# Each stage has a target of its own: corpora models policies activations divergence dictionaries comparison
# interpretation reports.
from snakemake.utils import min_version

min_version("9.27")

if not workflow.overwrite_configfiles:

    configfile: f"{workflow.basedir}/config.yaml"


include: "workflow/rules/common.smk"


report: "workflow/report/workflow.rst"


# Until a run has rebuilt it, a report whose inputs have changed says so.
onstart:
    run_alone()
    mark_reports(CONFIG)


onsuccess:
    forget_all(RESULTS)
    mark_reports(CONFIG)


onerror:
    forget_all(RESULTS)
    mark_reports(CONFIG)


rule all:
    default_target: True
    input:
        targets("reports"),
    localrule: True


include: "workflow/rules/targets.smk"
include: "workflow/rules/corpora.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/policies.smk"
include: "workflow/rules/activations.smk"
include: "workflow/rules/divergence.smk"
include: "workflow/rules/dictionaries.smk"
include: "workflow/rules/comparison.smk"
include: "workflow/rules/interpretation.smk"
include: "workflow/rules/reports.smk"
include: "workflow/rules/plants.smk"
include: "workflow/rules/paper.smk"
