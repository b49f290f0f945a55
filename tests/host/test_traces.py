"""Traces: each run that writes is a span with one for each step, sent by OTLP over HTTP to a real receiver."""

import base64
import json
import re
import socket
import subprocess
from typing import Any, Dict, Iterator, List

import pytest

from support import TOP, App, deep, missing
from test_notify import Receiver

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARSER = """
import json, sys
from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
request = json_format.Parse(sys.stdin.read(), ExportTraceServiceRequest())
print(sum(len(scope.spans) for resource in request.resource_spans for scope in resource.scope_spans))
"""


@pytest.fixture
def collector() -> Iterator[Receiver]:
    """A collector that takes everything."""
    made = Receiver()
    yield made
    made.stop()


def spans(collector: Receiver) -> List[Dict[str, Any]]:
    """The spans of the newest request, that of the run first."""
    found = collector.posts[-1]["body"]["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert isinstance(found, list)
    return found


def traced(app: App, collector: Receiver, more: str = "") -> None:
    """Configure the collector, and what else there is."""
    app.configure(f"[trace]\notlp = {collector.url}\n{more}")


def test_a_run_is_a_span_and_each_step_one_below_it(app: App, collector: Receiver) -> None:
    traced(app, collector)
    done = app.deploy("1.0")
    [post] = collector.posts
    assert post["path"] == "/v1/traces" and post["headers"]["Content-Type"] == "application/json"
    run, *steps = spans(collector)
    assert "parentSpanId" not in run and run["name"] == "deploy.py deploy" and run["status"] == {"code": 1}
    assert [step["name"] for step in steps] == [step["name"] for step in done.data["steps"]]
    assert {step["parentSpanId"] for step in steps} == {run["spanId"]} and {step["traceId"] for step in steps} == {run["traceId"]}
    assert len({span["spanId"] for span in [run] + steps}) == 1 + len(steps)
    starts = [int(span["startTimeUnixNano"]) for span in [run] + steps]
    assert starts == sorted(starts) and all(int(span["endTimeUnixNano"]) >= start for span, start in zip([run] + steps, starts))
    attributes = {found["key"]: found["value"] for found in run["attributes"]}
    assert attributes["deploy.exit_code"] == {"intValue": "0"} and attributes["deploy.id"] == {"stringValue": done.data["deploy_id"]}
    assert collector.posts[0]["body"]["resourceSpans"][0]["resource"]["attributes"][0] == {
        "key": "service.name", "value": {"stringValue": "myapp"}}


def test_the_callers_trace_goes_on_in_the_hooks(app: App, collector: Receiver) -> None:
    traced(app, collector, f"[hooks]\npost_deploy = sh -c 'echo \"$TRACEPARENT\" > {app.directory}/seen'")
    app.run("deploy", app.artifact("1.0"), env={"TRACEPARENT": f"00-{TRACE}-{PARENT}-01"}, check=0)
    run = spans(collector)[0]
    assert (run["traceId"], run["parentSpanId"]) == (TRACE, PARENT)
    assert (app.directory / "seen").read_text().strip() == f"00-{TRACE}-{run['spanId']}-01"
    app.run("deploy", app.artifact("1.1"), check=0)
    run = spans(collector)[0]
    assert (app.directory / "seen").read_text().strip() == f"00-{run['traceId']}-{run['spanId']}-01" and run["traceId"] != TRACE


def test_a_failure_is_the_status_of_its_step_and_of_the_run(app: App, collector: Receiver) -> None:
    traced(app, collector, "[hooks]\npost_activate = sh -c 'exit 9'")
    app.deploy("1.0", check=5)
    run, *steps = spans(collector)
    assert run["status"]["code"] == 2 and "exited with code 9" in run["status"]["message"]
    assert [step["name"] for step in steps if step["status"]["code"] == 2] == ["hook:post_activate"]


@pytest.mark.parametrize("env", [{"OTEL_SDK_DISABLED": "true"}, {"TRACEPARENT": f"00-{TRACE}-{PARENT}-00"}], ids=["disabled", "unsampled"])
def test_nothing_is_sent_that_nobody_wants(env: Dict[str, str], app: App, collector: Receiver) -> None:
    traced(app, collector)
    app.run("deploy", app.artifact("1.0"), env=env, check=0)
    app.run("status", check=0)
    app.run("-n", "deploy", app.artifact("1.1"), check=0)
    assert collector.posts == []


def test_the_environment_says_where_to_and_with_which_headers(app: App, collector: Receiver) -> None:
    app.configure("[trace]\notlp = environment")
    app.run("deploy", app.artifact("1.0"), check=0)
    assert collector.posts == []
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url + "/base", "OTEL_EXPORTER_OTLP_HEADERS": "x-key=a%20b, x-other=c",
           "OTEL_SERVICE_NAME": "shop"}
    app.run("deploy", app.artifact("1.1"), env=env, check=0)
    post = collector.posts[-1]
    assert post["path"] == "/base/v1/traces" and (post["headers"]["x-key"], post["headers"]["x-other"]) == ("a b", "c")
    assert post["body"]["resourceSpans"][0]["resource"]["attributes"][0]["value"] == {"stringValue": "shop"}
    app.run("deploy", app.artifact("1.2"), env=dict(env, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=collector.url + "/own"), check=0)
    assert collector.posts[-1]["path"] == "/own"


@deep
def test_a_collector_that_hangs_costs_a_warning_once_the_lock_is_free(app: App) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(5)
        app.configure(f"[trace]\notlp = http://127.0.0.1:{silent.getsockname()[1]}")
        done = app.deploy("1.0")
    assert [text for text in done.data["warnings"] if re.match(r"trace: not sent: no answer within 3", text)]


def test_a_collector_that_cannot_be_one_is_usage(app: App) -> None:
    app.configure("[trace]\notlp = collector:4318")
    assert "expected http://HOST:PORT, https://HOST/... or environment" in app.run("status", check=2).data["msg"]


def test_the_official_definitions_take_it(app: App, collector: Receiver) -> None:
    python = TOP / ".cache" / "otlp" / "bin" / "python"
    if not python.exists():
        missing("opentelemetry-proto in .cache/otlp")
    traced(app, collector)
    app.deploy("1.0")
    # Protobuf's own JSON has base64 where OTLP has hexadecimal digits.
    text = re.sub(r'"(traceId|spanId|parentSpanId)": "([0-9a-f]+)"', lambda found: '"{}": "{}"'.format(
        found.group(1), base64.b64encode(bytes.fromhex(found.group(2))).decode("ascii")), json.dumps(collector.posts[0]["body"]))
    done = subprocess.run([str(python), "-c", PARSER], input=text.encode("ascii"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    assert int(done.stdout) == len(spans(collector))
