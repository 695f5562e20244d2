# Configuration, paths and input functions that the rules share. What an artifact is made of and which settings shape it
# stands in rlsae/layout.py; here it is only turned into the strings that Snakemake wants.
import functools
import json
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

sys.path.insert(0, workflow.basedir)

from rlsae.artifacts import canonical_json, digest
from rlsae.code_digest import code_digest
from rlsae.config import ExternalDictionary, PretrainedModel
from rlsae.errors import RlsaeError
from rlsae.expand import parse_config
from rlsae.heads import claim_results
from rlsae.layout import RESULTS, SURVEY, Layout, kind_of, model_of, policy_folder, run_this_checkout, weights_folder
from rlsae.plants.trials import all_trials
from rlsae.resumable import forget_all
from rlsae.status import mark_reports

run_this_checkout(workflow.basedir)
try:
    CONFIG = parse_config(config)
    LAYOUT = Layout(CONFIG)
    LAYOUT.check_layers()
except RlsaeError as error:
    raise WorkflowError(f"The configuration is not valid.\n{error}") from None


def run_alone():
    """Refuse to run beside another Snakemake, or beside the Slurm jobs of one that is gone, on the same results."""
    try:
        claim_results()
    except (RlsaeError, OSError) as error:
        raise WorkflowError(str(error)) from None


def one_of(names):
    """A pattern that matches these names and nothing else."""
    return "|".join(names) or "(?!)"


wildcard_constraints:
    corpus=r"[a-z0-9-]+",
    model=r"[a-z0-9-]+",
    tuning=r"[a-z0-9-]+",
    policy=r"[a-z0-9-]+(\.[a-z0-9-]+(@\d+)?)?",
    activation=r"[a-z0-9-]+",
    kind=r"survey|layers(-\d+)+",
    layer=r"\d+",
    part=r"\d+",
    dictionary=r"[a-z0-9-]+",
    study=r"[a-z0-9-]+",
    method=r"[a-z_]+",
    variation=r"[a-z0-9-]+",
    documents=r"\d+",
    seed=r"\d+",


def settings(describe, *names):
    """A params function: the settings of an artifact as canonical JSON, so that the order of keys reruns nothing."""

    def of(wildcards):
        return canonical_json(describe(*(wildcards[name] for name in names)))

    return of


def plant_settings(wildcards):
    """A trial on a plant as canonical JSON."""
    numbers = {name: int(wildcards[name]) for name in ("documents", "seed")}
    return canonical_json({"method": wildcards.method, "variation": wildcards.variation} | numbers)


def option(name, path):
    """A command-line option, or nothing where there is no path."""
    return f"--{name} {shlex.quote(str(path))}" if path else ""


# --- manifests and data of one artifact: consumers depend on the manifest's content and only on the data's presence -----


def corpus_files(corpus):
    data = "documents" if CONFIG.corpora[corpus].kind == "documents" else "pairs"
    return [
        f"results/corpora/{corpus}/manifest.json",
        ancient(f"results/corpora/{corpus}/{data}.parquet"),
    ]


def policy_files(policy):
    data = "checkpoints" if "@" in policy else "model"
    return [
        f"{policy_folder(policy)}/manifest.json",
        ancient(f"{policy_folder(policy)}/{data}"),
    ]


def token_files(model, corpus):
    folder = f"results/tokens/{model}.{corpus}"
    return [f"{folder}/manifest.json", ancient(f"{folder}/store")]


def activation_folder(policy, study, kind):
    entry = CONFIG.studies[study]
    return f"results/activations/{policy}.{entry.corpus}/{entry.activation}/{kind}"


def activation_files(policy, study, kind):
    folder = activation_folder(policy, study, kind)
    return [f"{folder}/manifest.json", ancient(f"{folder}/store")]


# --- what a study is made of ---------------------------------------------------------------------------------------


def layers_of_study(study):
    """The layers of a study; waits for the checkpoint only where they must be measured."""
    static = LAYOUT.static_layers(study)
    if static is not None:
        return static
    chosen = checkpoints.rank_layers.get(study=LAYOUT.layer_source(study)).output.chosen
    return json.loads(Path(chosen).read_text())["layers"]


def roles(study):
    entry = CONFIG.studies[study]
    return {"base": entry.base, "tuned": entry.tuned}


def dictionary_folders(study):
    """Folder by role/layer/dictionary."""
    entry, layers = CONFIG.studies[study], layers_of_study(study)
    return {
        f"{role}/{layer}/{name}": LAYOUT.dictionary_folder(policy, entry, kind_of(layers), layer, name)
        for role, policy in roles(study).items()
        for layer in layers
        for name in LAYOUT.dictionaries_of(policy, entry)
    }


def store_folders(study):
    """Folder of the training activations by role."""
    kind = kind_of(layers_of_study(study))
    return {role: activation_folder(policy, study, kind) for role, policy in roles(study).items()}


def dictionary_files(study):
    folders = dictionary_folders(study).values()
    return [f"{folder}/manifest.json" for folder in folders] + [ancient(f"{folder}/saes") for folder in folders]


def store_files(study):
    folders = store_folders(study).values()
    return [f"{folder}/manifest.json" for folder in folders] + [ancient(f"{folder}/store") for folder in folders]


def named(flag, folders):
    """Repeated KEY=FOLDER options."""
    return " ".join(f"--{flag} {key}={folder}" for key, folder in folders.items())


def dictionary_options(wildcards):
    return named("dictionary", dictionary_folders(wildcards.study))


def store_options(wildcards):
    return named("store", store_folders(wildcards.study))


def models_and_tokens(wildcards):
    """The models of a study and the text on which dictionaries serve them."""
    weights = {role: weights_folder(policy) for role, policy in roles(wildcards.study).items()}
    entry = CONFIG.studies[wildcards.study]
    return f"{named('weights', weights)} {option('tokens', f'results/tokens/{entry.model}.{entry.corpus}')}"


# --- targets: every manifest and every store up to a stage, so that a failed rerun can never leave a stale result as current


def corpora_of(study):
    entry = CONFIG.studies[study]
    model = CONFIG.models[entry.model]
    names = [entry.corpus, prompts_of(study)]
    return {*names, model.corpus} if isinstance(model, PretrainedModel) else set(names)


def surveyed(study):
    """The policies whose layers are measured: base, tuned, and the checkpoints between."""
    return [*roles(study).values(), *LAYOUT.checkpoints(study).values()]


def survey_files(study):
    return [file for policy in surveyed(study) for file in activation_files(policy, study, SURVEY)]


def training_files(study):
    kind = kind_of(layers_of_study(study))
    return [file for policy in roles(study).values() for file in activation_files(policy, study, kind)]


def kept(study, files):
    """Manifests, and stores but for those that may go once they have been used."""
    keep = CONFIG.activations[CONFIG.studies[study].activation].keep
    return [file for file in files if keep or Path(file).name != "store"]


STAGES = {
    "corpora": lambda study: [file for corpus in sorted(corpora_of(study)) for file in corpus_files(corpus)],
    "models": lambda study: policy_files(CONFIG.studies[study].base),
    "policies": lambda study: policy_files(CONFIG.studies[study].tuned)
    + policy_files(CONFIG.studies[study].tuned.split("@")[0]),
    "tokens": lambda study: token_files(CONFIG.studies[study].model, CONFIG.studies[study].corpus),
    "survey": lambda study: kept(study, survey_files(study)),
    "divergence": lambda study: [
        f"results/divergence/{study}/manifest.json",
        f"results/divergence/{study}/chosen.json",
    ],
    "activations": lambda study: kept(study, training_files(study)),
    "dictionaries": dictionary_files,
    "comparison": lambda study: [f"results/comparison/{study}/manifest.json"],
    "interpretation": lambda study: [f"results/interpretation/{study}/manifest.json"],
    "reports": lambda study: [f"results/reports/{study}/manifest.json", "results/reports/index.html"],
}


def targets(last):
    """One input function per study, so that no study waits for another's choice of layers."""

    def up_to(wildcards, study):
        wanted = []
        for stage, files in STAGES.items():
            wanted += files(study)
            if stage == last:
                return wanted

    return [functools.partial(up_to, study=study) for study in CONFIG.studies]


# --- inputs and options of single rules -----------------------------------------------------------------------------


def finished_studies(wildcards):
    """Digests of the studies in the results: a parameter, since as inputs they would be made again where they are stale."""
    return [digest(path) for path in sorted(Path("results").glob("interpretation/*/manifest.json"))]


def corpus_source(wildcards):
    return source_files(CONFIG.corpora[wildcards.corpus])


def corpora_of_kind(kind):
    """A pattern of the names of the corpora that hold documents, or preferences."""
    return one_of([name for name, entry in CONFIG.corpora.items() if entry.kind == kind])


def model_corpus(wildcards):
    entry = CONFIG.models[wildcards.model]
    return corpus_files(entry.corpus) if isinstance(entry, PretrainedModel) else []


def source_files(entry):
    """The file that an entry names, or the files of its folder, so that a change of any of them is seen."""
    path = getattr(entry, "path", None)
    if not path:
        return []
    return sorted(str(p) for p in Path(path).glob("*") if p.is_file()) or [path]


def model_source(wildcards):
    return source_files(CONFIG.models[wildcards.model])


def model_options(wildcards):
    entry = CONFIG.models[wildcards.model]
    if isinstance(entry, PretrainedModel):
        return option("corpus", f"results/corpora/{entry.corpus}")
    return option("source", getattr(entry, "path", None))


def tuning_corpus(wildcards):
    return corpus_files(CONFIG.tunings[wildcards.tuning].corpus)


def reward_of(wildcards):
    return CONFIG.rewards[CONFIG.tunings[wildcards.tuning].reward]


def reward_files(wildcards):
    return source_files(reward_of(wildcards))


def external_files(wildcards):
    return source_files(CONFIG.tunings[wildcards.tuning])


def tuning_options(wildcards):
    reward, tuning = reward_of(wildcards), CONFIG.tunings[wildcards.tuning]
    return " ".join(option(name, getattr(entry, "path", None)) for name, entry in (("reward-file", reward), ("tuned", tuning)))


def dictionary_source(wildcards):
    """The folder of an external autoencoder."""
    entry = CONFIG.dictionaries[wildcards.dictionary]
    if not isinstance(entry, ExternalDictionary):
        return None
    return entry.folder(wildcards.layer, wildcards.policy)


def dictionary_source_files(wildcards):
    folder = dictionary_source(wildcards)
    return sorted(str(path) for path in folder.glob("*") if path.is_file()) or [str(folder)] if folder else []


def dictionary_start(wildcards):
    """The dictionaries that this one continues."""
    start = LAYOUT.started_from(wildcards.dictionary, wildcards.policy, wildcards.corpus)
    if start is None:
        return None
    policy, corpus, name = start
    rows = f"{policy}.{corpus}/{wildcards.activation}/{wildcards.kind}"
    return f"results/dictionaries/{rows}/layer{wildcards.layer}/{name}"


def dictionary_start_files(wildcards):
    folder = dictionary_start(wildcards)
    return [f"{folder}/manifest.json", ancient(f"{folder}/saes")] if folder else []


def base_rows(wildcards):
    """The base's activations for a recipe that reads the rows of both policies."""
    if not LAYOUT.is_joint(wildcards.dictionary):
        return None
    return f"results/activations/{model_of(wildcards.policy)}.{wildcards.corpus}/{wildcards.activation}/{wildcards.kind}"


def base_files(wildcards):
    """Those activations, and the base itself."""
    folder = base_rows(wildcards)
    return [f"{folder}/manifest.json", ancient(f"{folder}/store"), *policy_files(model_of(wildcards.policy))] if folder else []


def dictionary_sources(wildcards):
    """What only some recipes need: the base's dictionaries to start from, an external autoencoder, the base's rows and model."""
    rows = base_rows(wildcards)
    folders = {"start": dictionary_start(wildcards), "source": dictionary_source(wildcards), "base-activations": rows}
    folders |= {"base-weights": weights_folder(model_of(wildcards.policy)) if rows else None}
    return " ".join(option(name, folder) for name, folder in folders.items())


def activation_parts(wildcards):
    count = LAYOUT.parts(wildcards.activation, wildcards.kind)
    folder = f"results/activations/{wildcards.policy}.{wildcards.corpus}/{wildcards.activation}/{wildcards.kind}"
    return [f"{folder}/part-{part}.json" for part in range(count)]


def tokens_of_policy(wildcards):
    return token_files(model_of(wildcards.policy), wildcards.corpus)


def same_as(study):
    source = LAYOUT.layer_source(study)
    return f"results/divergence/{source}" if source != study else None


def tuning_of_study(study):
    return CONFIG.tunings[CONFIG.studies[study].tuning.split("@")[0]]


def prompts_of(study):
    return tuning_of_study(study).corpus


def reward_of_study(study):
    return CONFIG.rewards[tuning_of_study(study).reward]


def llm_of_study(study):
    return CONFIG.llms.get(CONFIG.studies[study].llm)


def probes_of_study(study):
    return CONFIG.studies[study].interpretation.probes


def divergence_sample(wildcards):
    entry = CONFIG.studies[wildcards.study]
    folders = {"tokens": f"results/tokens/{entry.model}.{entry.corpus}"}
    folders |= {"corpus": f"results/corpora/{prompts_of(wildcards.study)}"}
    folders |= {"reward-file": getattr(reward_of_study(wildcards.study), "path", None)}
    return " ".join(option(name, folder) for name, folder in folders.items())


def interpretation_policies(wildcards):
    """Options that name the policies of a study, and the prompts and the reward that the tuned one was judged by."""
    policy = roles(wildcards.study)
    folders = {"base": policy_folder(policy["base"]), "tuned": policy_folder(policy["tuned"])}
    folders |= {"tuned-weights": weights_folder(policy["tuned"])}
    folders |= {"corpus": f"results/corpora/{prompts_of(wildcards.study)}"}
    folders |= {"reward-file": getattr(reward_of_study(wildcards.study), "path", None)}
    folders |= {"llm-path": getattr(llm_of_study(wildcards.study), "path", None)}
    folders |= {"triples": getattr(probes_of_study(wildcards.study), "path", None)}
    return " ".join(option(name, folder) for name, folder in folders.items())


def divergence_checkpoints(wildcards):
    checkpoints = LAYOUT.checkpoints(wildcards.study)
    return named("checkpoint", {s: activation_folder(p, wildcards.study, SURVEY) for s, p in checkpoints.items()})


def divergence_option(role):
    def of(wildcards):
        policy = roles(wildcards.study)[role]
        survey = activation_folder(policy, wildcards.study, SURVEY)
        return f"--{role} {policy_folder(policy)} --{role}-weights {weights_folder(policy)} --survey-{role} {survey}"

    return of
