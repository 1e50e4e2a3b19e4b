"""The `pegbox` command: everything a person starts by hand. With `launch/`, where its longer commands stand, it is the
only place that reaches all sides.

Each command imports what it needs when it runs, so that `pegbox tokens create` waits for no torch and `pegbox train`
for no web framework.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from core.errors import USER_FAULTS, UserError, UserErrors

DATA_DIR_HELP = "where everything is kept (PEGBOX_DATA_DIR, ./data)"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if getattr(arguments, "data_dir", None):
        os.environ["PEGBOX_DATA_DIR"] = str(Path(arguments.data_dir).expanduser().resolve())
    try:
        return int(arguments.run(arguments))
    except USER_FAULTS as fault:
        _print_faults(fault)
        return 65
    except KeyboardInterrupt:
        return 130


def _print_faults(fault: UserError | UserErrors) -> None:
    for error in fault.errors:
        print(f"{error.field}: {error.text()}" if error.field else error.text(), file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pegbox", description="Fine-tune language models on your own GPUs.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: object, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(run=run)
        return added

    def add_place(to: argparse.ArgumentParser, *, port: bool = True) -> None:
        to.add_argument("--data-dir", metavar="D", help=DATA_DIR_HELP)
        if port:
            to.add_argument("--host", help="address to listen on (PEGBOX_HOST, 127.0.0.1)")
            to.add_argument("--port", type=int, help="port to listen on (PEGBOX_PORT, 8000)")

    def add_devices(to: argparse.ArgumentParser) -> None:
        to.add_argument("--gpus", default="all", help="all, none, or the numbers of the GPUs to offer, as 0,1")
        to.add_argument("--cpu-slots", type=int, help="jobs at a time on the CPU (default: 1 where there is no GPU)")

    up = command("up", _up, "Start Redis (an embedded Valkey), the web service and a worker on this machine.")
    add_place(up)
    add_devices(up)

    web = command("web", _web, "Start the web service alone.")
    add_place(web)

    worker = command("worker", _worker, "Offer this machine's GPUs to a Pegbox server.")
    worker.add_argument("--server", help="the server's address (PEGBOX_URL)")
    worker.add_argument("--token", help="a worker token (better: PEGBOX_WORKER_TOKEN, which no process list shows)")
    add_place(worker, port=False)
    add_devices(worker)

    demo = command("demo", _demo, "Start everything and train the built-in model on the built-in data.")
    add_place(demo)
    add_devices(demo)
    demo.add_argument("--exit", action="store_true", help="stop everything when the job has ended; 0 only on success")

    train = command("train", _train, "Train on this machine without a server.")
    train.add_argument("-f", "--file", required=True, type=Path, metavar="SPEC", help="the spec, YAML or JSON")
    train.add_argument("--out", type=Path, metavar="DIR", help="where checkpoints and result go")
    train.add_argument("--dry-run", action="store_true", help="print as JSON what the job would do, and train nothing")
    train.add_argument("--fresh", action="store_true", help="start over: what DIR holds of this job is deleted")

    _add_question(command("preflight", _preflight, "Ask a server what a job would do; nothing is launched."))

    certify = command("certify", _certify, "Prove on a job that packing, devices and ZeRO change nothing but its cost.")
    certify.add_argument("-f", "--file", required=True, type=Path, metavar="SPEC", help="the spec, YAML or JSON")
    certify.add_argument("--steps", type=int, default=3, metavar="K", help="optimizer steps of each layout (3)")
    certify.add_argument("--ranks", type=int, metavar="N", help="devices for DDP and ZeRO (2, or the GPUs there are)")
    certify.add_argument("--out", type=Path, metavar="DIR", help="keep the runs here (default: a temporary folder)")
    certify.add_argument("-o", choices=("table", "json"), default="table", dest="form", help="how it is printed")

    merge = command("merge", _merge, "Make a trained adapter part of its base: a model that any server takes.")
    merge.add_argument("adapter", type=Path, metavar="RESULT", help="a job's directory, or its result/")
    merge.add_argument("--out", required=True, type=Path, metavar="DIR", help="the new folder for the merged model")
    merge.add_argument("--base", metavar="MODEL", help="the base's folder or name (default: what the adapter names)")

    doctor = command("doctor", _doctor, "Say what this machine has, and what is missing with its remedy.")
    add_place(doctor)

    _add_tokens(command("tokens", None, "Make tokens for scripts and workers."))
    return parser


def _add_question(preflight: argparse.ArgumentParser) -> None:
    preflight.add_argument("-f", "--file", required=True, type=Path, metavar="SPEC", help="the spec, YAML or JSON")
    preflight.add_argument("-o", choices=("text", "json"), default="text", dest="form", help="how it is printed")
    preflight.add_argument("--server", help="the server's address (PEGBOX_URL, http://127.0.0.1:8000)")
    preflight.add_argument("--token", help="a token (better: PEGBOX_TOKEN, which no process list shows)")
    preflight.add_argument("--device", default="", help="plan for this device or host (default: the likeliest)")


def _add_tokens(tokens: argparse.ArgumentParser) -> None:
    create = tokens.add_subparsers(metavar="ACTION", required=True).add_parser(
        "create", help="Make a token and print it alone on stdout; run on the server's machine."
    )
    create.set_defaults(run=_create_token)
    create.add_argument("--name", required=True, help="what it is for; shown in the list of tokens")
    create.add_argument("--role", choices=("viewer", "member", "admin", "worker"), default="member")
    create.add_argument("--data-dir", metavar="D", help=DATA_DIR_HELP)


def _put_place_into_environment(arguments: argparse.Namespace) -> None:
    """Command line beats environment; children read the environment."""
    if arguments.host:
        os.environ["PEGBOX_HOST"] = arguments.host
    if arguments.port is not None:
        os.environ["PEGBOX_PORT"] = str(arguments.port)


def _read_dotenv() -> None:
    """For workers and trainers, whose settings come from the environment alone."""
    from app.settings import read_dotenv

    for name, value in read_dotenv(Path(".env")).items():
        os.environ.setdefault(name, value)


def _web(arguments: argparse.Namespace) -> int:
    from app.server import serve
    from app.settings import load_settings

    _put_place_into_environment(arguments)
    serve(load_settings())
    return 0


def _worker(arguments: argparse.Namespace) -> int:
    import logging

    from worker import agent
    from worker.settings import WorkerSettings

    logging.basicConfig(level=logging.INFO, format="%(asctime)s worker: %(message)s")
    _read_dotenv()
    if arguments.server:
        os.environ["PEGBOX_URL"] = arguments.server
    if arguments.token:
        os.environ["PEGBOX_WORKER_TOKEN"] = arguments.token
    settings = WorkerSettings.from_environment().model_copy(
        update={"gpus": arguments.gpus, "cpu_slots": arguments.cpu_slots}
    )
    if not settings.token:
        raise UserError("worker.no_token", "PEGBOX_WORKER_TOKEN")
    agent.run(settings)
    return 0


def _up(arguments: argparse.Namespace) -> int:
    from launch.up import Launch

    _put_place_into_environment(arguments)
    with Launch(gpus=arguments.gpus, cpu_slots=arguments.cpu_slots) as launch:
        launch.start()
        print(f"Pegbox is ready at {launch.settings.url}", flush=True)
        return launch.wait()


def _demo(arguments: argparse.Namespace) -> int:
    from launch.demo import run_demo

    _put_place_into_environment(arguments)
    return run_demo(gpus=arguments.gpus, cpu_slots=arguments.cpu_slots, exits=arguments.exit)


def _train(arguments: argparse.Namespace) -> int:
    from worker.by_hand import prepare_directory, print_plan, read_spec_file, train_ranks
    from worker.processes import PATIENT_THREADS
    from worker.settings import WorkerSettings

    _read_dotenv()
    # Read by OpenMP when torch is loaded, which making the demo model or fetching data may do.
    for name, value in PATIENT_THREADS.items():
        os.environ.setdefault(name, value)
    spec = read_spec_file(arguments.file)
    settings = WorkerSettings.from_environment()
    model_roots, cache_dir = settings.model_roots, settings.cache_dir
    if arguments.dry_run:
        return print_plan(spec, model_roots, cache_dir)
    if arguments.out is None:
        raise UserError("train.no_out", "--out")
    prepared = prepare_directory(spec, arguments.out, model_roots, cache_dir, fresh=arguments.fresh)
    if prepared.is_finished:
        print(f"{arguments.out} is finished; its result is in {arguments.out / 'result'}", file=sys.stderr)
        return 0
    if spec.parallel.devices > 1:
        return train_ranks(prepared.directory)
    from worker.engine.train import main as train

    return train(prepared.directory)


def _preflight(arguments: argparse.Namespace) -> int:
    from client.preflight import Asked, preflight

    return preflight(Asked(arguments.file, arguments.form, arguments.server, arguments.token, device=arguments.device))


def _certify(arguments: argparse.Namespace) -> int:
    import tempfile

    from worker.by_hand import read_spec_file
    from worker.certify import certify, most_ranks_here, write_certificate
    from worker.settings import WorkerSettings

    _read_dotenv()
    spec = read_spec_file(arguments.file)
    with tempfile.TemporaryDirectory(prefix="pegbox-certify-") as temporary:
        certificate = certify(
            spec,
            arguments.out or Path(temporary),
            WorkerSettings.from_environment(),
            steps=arguments.steps,
            most_ranks=arguments.ranks or most_ranks_here(),
        )
    write_certificate(certificate, arguments.form)
    return 0 if certificate.holds else 1


def _merge(arguments: argparse.Namespace) -> int:
    from transformers.utils.logging import disable_progress_bar

    from worker.by_hand import find_adapter
    from worker.engine.merge import merge
    from worker.settings import WorkerSettings

    _read_dotenv()
    model_roots = WorkerSettings.from_environment().model_roots
    disable_progress_bar()
    adapter, base = find_adapter(arguments.adapter, arguments.base, model_roots)
    merged = merge(adapter, base, arguments.out)
    print(
        f"{arguments.out} holds the merged model, checked: the adapter moves logits by {merged.effect:.2g} of their "
        f"scale, and merging into {str(merged.dtype).removeprefix('torch.')} rounds them by {merged.rounding:.1g}"
    )
    return 0


def _create_token(arguments: argparse.Namespace) -> int:
    from app.settings import load_settings
    from launch.tokens import make_token

    print(make_token(load_settings(), arguments.name, arguments.role))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from launch.doctor import report

    _put_place_into_environment(arguments)
    findings = report()
    for finding in findings:
        print(finding)
    return 1 if any(finding.is_fault for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
