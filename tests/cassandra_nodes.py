"""Real Cassandra nodes, from the project's own jars, on loopback addresses only."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from tests import servers
from tests.servers import Process, Server, ServerFolder, require

POM = Path(__file__).parent / "cassandra" / "pom.xml"
JARS = "TEST_CASSANDRA_JARS"
"""The environment variable with the folder of the jars, where Maven need not be asked for them."""
APT = "apt-get install openjdk-17-jre-headless maven"
HEAP = "256M"
PATIENCE = 240
"""Seconds for a node to answer."""

OPENED = {
    "java.base": "java.io java.lang java.lang.module java.lang.reflect java.nio java.util java.util.concurrent "
    "java.util.concurrent.atomic jdk.internal.loader jdk.internal.math jdk.internal.module jdk.internal.ref "
    "jdk.internal.reflect jdk.internal.util.jar sun.nio.ch",
    "jdk.compiler": "com.sun.tools.javac",
    "jdk.management": "com.sun.management.internal",
}
EXPORTED = {
    "java.base": "java.lang.ref jdk.internal.misc",
    "java.management.rmi": "com.sun.jmx.remote.internal.rmi",
    "java.rmi": "sun.rmi.registry sun.rmi.server",
    "java.sql": "java.sql",
    "jdk.attach": "sun.tools.attach",
    "jdk.compiler": "com.sun.tools.javac.file",
    "jdk.unsupported": "sun.misc",
}
"""What Cassandra reaches into that Java 17 keeps closed."""
PROPERTIES = {
    "cassandra-foreground": "yes",
    "cassandra.consistent.rangemovement": "false",
    "cassandra.ring_delay_ms": "10000",
    "cassandra.skip_wait_for_gossip_to_settle": "0",
    "cassandra.superuser_setup_delay_ms": "0",
    "io.netty.allocator.type": "unpooled",
    "io.netty.tryReflectionSetAccessible": "true",
    "java.net.preferIPv4Stack": "true",
    "jdk.attach.allowAttachSelf": "true",
}
LOGBACK = """<configuration>
  <appender name="F" class="ch.qos.logback.core.FileAppender">
    <file>{folder}/system.log</file>
    <encoder><pattern>%-5level %date{{HH:mm:ss.SSS}} %logger{{0}} %msg%n</pattern></encoder>
  </appender>
  <root level="INFO"><appender-ref ref="F"/></root>
</configuration>
"""


def java() -> str | None:
    """Return the program of Java 17, or None; 5.0 needs that, and later ones do not run it."""
    found = sorted(Path("/usr/lib/jvm").glob("java-17-*/bin/java"))
    home = os.environ.get("JAVA_HOME")
    for program in (*map(str, found), *([f"{home}/bin/java"] if home else []), shutil.which("java")):
        if program and Path(program).exists():
            told = subprocess.run([program, "-version"], capture_output=True, text=True, check=False).stderr
            if 'version "17' in told:
                return program
    return None


def require_cassandra() -> None:
    """Skip, or fail, where something for a node is missing."""
    require(importlib.util.find_spec("cassandra"), "The driver of Cassandra", "pip install cassandra-driver")
    require(java(), "Java 17, for Cassandra,", APT)
    require(JARS in os.environ or _cache().exists() or shutil.which("mvn"), "Maven, for Cassandra,", APT)


def _cache() -> Path:
    digest = hashlib.sha256(POM.read_bytes()).hexdigest()[:12]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "flask-eventsourcing-tests" / f"cassandra-{digest}"


def jars() -> Path:
    """Return the folder with the jars, which Maven fills once for each user of the machine."""
    if JARS in os.environ:
        return Path(os.environ[JARS])
    folder = _cache()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            draft = folder.with_suffix(".draft")
            shutil.rmtree(draft, ignore_errors=True)
            command = ["mvn", "-q", "-B", "-ntp", "-f", str(POM), "dependency:copy-dependencies"]
            command += ["-DincludeScope=runtime", f"-DoutputDirectory={draft}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{command!r} failed: {(done.stdout + done.stderr)[-2000:]}")
            draft.rename(folder)
    return folder


@dataclass
class Node:
    """One node of a cluster, which can be started again after it was killed.

    :param address: a loopback address.
    :param folder: where it keeps everything.
    :param settings: lines of its ``cassandra.yaml``, as a mapping.
    """

    address: str
    folder: Path
    settings: dict[str, object]
    wrapper: Sequence[str] = ()
    """A program, with its arguments, that runs the one named after them."""
    record: Path | None = None
    """Where it is written down while it runs."""
    process: Process | None = None

    @property
    def port(self) -> int:
        """Where it takes CQL."""
        port = self.settings["native_transport_port"]
        return port if isinstance(port, int) else 0

    @property
    def url(self) -> str:
        """Its address and port."""
        return f"{self.address}:{self.port}"

    def start(self) -> None:
        """Start it; :meth:`wait` for its answer before it is used."""
        folder = self.folder
        # What is JSON is YAML too.
        (folder / "cassandra.yaml").write_text(json.dumps(self.settings, indent=1))
        (folder / "logback.xml").write_text(LOGBACK.format(folder=folder))
        properties = PROPERTIES | {
            "cassandra.config": f"file://{folder}/cassandra.yaml",
            "cassandra.logdir": str(folder),
            "cassandra.storagedir": str(folder),
            "java.io.tmpdir": str(folder),
            "jna.tmpdir": str(folder),
            "logback.configurationFile": f"file://{folder}/logback.xml",
        }
        command = [*self.wrapper, java() or "java", f"-Xms{HEAP}", f"-Xmx{HEAP}", "-Xss384k"]
        command += ["-XX:+UseSerialGC", "-XX:-UsePerfData", "-XX:+ExitOnOutOfMemoryError", "-XX:TieredStopAtLevel=1"]
        for option, packages in (("--add-opens", OPENED), ("--add-exports", EXPORTED)):
            command += [f"{option}={module}/{n}=ALL-UNNAMED" for module, all_ in packages.items() for n in all_.split()]
        command += [f"-D{key}={value}" for key, value in properties.items()]
        command += ["-cp", f"{jars()}/*", "org.apache.cassandra.service.CassandraDaemon"]
        self._spawned = servers.spawn(command, folder / "log")
        self.process = Process.of(self._spawned.pid)
        if self.record is not None:
            servers.write_record(self.record, self.server())

    def server(self) -> Server:
        """Return where it answers, and how it is ended."""
        return Server(self.url, Process.of(self._spawned.pid), signal.SIGKILL)

    def wait(self) -> None:
        """Wait until it answers."""
        servers.wait_until(self._answers, self._spawned, self.folder / "log", PATIENCE)

    def kill(self) -> None:
        """Kill it, as a machine that loses its power does."""
        if self.process is not None:
            self.process.stop(signal.SIGKILL)
            self.process = None

    def _answers(self) -> bool:
        with socket.create_connection((self.address, self.port), timeout=5) as connection:
            connection.sendall(b"\x04\x00\x00\x00\x05\x00\x00\x00\x00")  # OPTIONS, in version 4 of the protocol
            return connection.recv(9)[4:5] == b"\x06"  # SUPPORTED


def ahead_of_time(folder: Path, seconds: int) -> list[str]:
    """Return what runs a node whose clock is ahead of the machine's.

    :param folder: where the library is made that does it.
    """
    require(shutil.which("cc"), "A compiler of C, for other clocks,", "apt-get install build-essential")
    library = folder / "ahead.so"
    # A JVM under libfaketime, which does more, takes minutes to start.
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(POM.with_name("ahead.c"))], check=True)
    return ["env", f"LD_PRELOAD={library}", f"AHEAD={seconds}"]


def nodes_of(folders: Sequence[Path], **settings: object) -> list[Node]:
    """Return the nodes of a new cluster, none of them started; they have ports of their own on 127.0.0.1 and further.

    :param folders: one for each.
    :param settings: what is to be other than usual in each ``cassandra.yaml``.
    """
    addresses = [f"127.0.0.{number}" for number in range(1, len(folders) + 1)]
    storage, cql = _ports(addresses), _ports(addresses)
    made = []
    for number, (address, folder) in enumerate(zip(addresses, folders, strict=True)):
        own = _settings(address, folder) | {
            "initial_token": str(-(2**63) + number * (2**64 // len(folders)) + 1),
            "native_transport_port": cql,
            "seed_provider": [
                {
                    "class_name": "org.apache.cassandra.locator.SimpleSeedProvider",
                    "parameters": [{"seeds": f"{addresses[0]}:{storage}"}],
                }
            ],
            "storage_port": storage,
        }
        made.append(Node(address, folder, own | settings))
    return made


def _settings(address: str, folder: Path) -> dict[str, object]:
    return {
        "auto_bootstrap": False,
        "auto_snapshot": False,
        "cdc_raw_directory": f"{folder}/cdc",
        "cluster_name": "tests",
        "commitlog_directory": f"{folder}/commitlog",
        # A node that is killed keeps what it has acknowledged.
        "commitlog_sync": "batch",
        "commitlog_total_space": "256MiB",
        "concurrent_compactors": 1,
        "concurrent_counter_writes": 2,
        "concurrent_reads": 8,
        "concurrent_writes": 16,
        "data_file_directories": [f"{folder}/data"],
        "disk_access_mode": "mmap_index_only",
        "endpoint_snitch": "SimpleSnitch",
        "file_cache_size": "16MiB",
        "hints_directory": f"{folder}/hints",
        # Otherwise a node whose clock is ahead ignores what others send: of two that are left, neither would answer.
        "internode_timeout": False,
        "key_cache_size": "0MiB",
        "listen_address": address,
        "memtable_allocation_type": "heap_buffers",
        "memtable_heap_space": "96MiB",
        "memtable_offheap_space": "96MiB",
        "num_tokens": 1,
        "partitioner": "org.apache.cassandra.dht.Murmur3Partitioner",
        "paxos_state_purging": "repaired",
        "paxos_variant": "v2",
        "rpc_address": address,
        "saved_caches_directory": f"{folder}/caches",
    }


def _ports(addresses: Sequence[str]) -> int:
    """Return a port that is free on each address."""
    while True:
        port = 15_000 + secrets.randbelow(17_000)
        try:
            with ExitStack() as stack:
                for address in addresses:
                    stack.enter_context(socket.socket()).bind((address, port))
        except OSError:
            continue
        return port


def start_node(folder: Path) -> Server:
    """Start a cluster of one node."""
    (node,) = nodes_of([folder])
    node.start()
    node.wait()
    return node.server()


@contextmanager
def cassandra_cluster(folder: ServerFolder, count: int = 3, **settings: object) -> Iterator[list[Node]]:
    """Run a cluster for one test, or for the tests of one group; its nodes can be killed and started again."""
    require_cassandra()
    path = folder.path / f"cassandra-cluster-{secrets.token_hex(4)}"
    places = [path / f"node{number}" for number in range(1, count + 1)]
    for place in places:
        place.mkdir(parents=True)
    nodes = nodes_of(places, **settings)
    try:
        for number, node in enumerate(nodes):
            node.record = folder.path / f"{path.name}-{number}.json"
            node.start()
            # The others find the first one.
            if number == 0:
                node.wait()
        for node in nodes:
            node.wait()
        yield nodes
    finally:
        for node in nodes:
            node.kill()
            if node.record is not None:
                node.record.unlink(missing_ok=True)
        servers.forget_ended()
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def keyspace_on(url: str) -> Iterator[str]:
    """Give the name of a keyspace that is on no node yet, and drop it afterwards."""
    name = f"test_{uuid4().hex}"
    yield name
    with session_on(url) as session:
        session.execute(f"DROP KEYSPACE IF EXISTS {name}", timeout=60)


@contextmanager
def session_on(url: str) -> Iterator[Any]:
    """Open a session of the driver with a node, past the package."""
    from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile
    from cassandra.policies import RoundRobinPolicy

    address, _, port = url.partition(":")
    profile = ExecutionProfile(load_balancing_policy=RoundRobinPolicy(), request_timeout=60)
    # Without these, two seconds in which a loaded machine gives the node no time end a test.
    patience = {"connect_timeout": 60, "control_connection_timeout": 60}
    profiles = {EXEC_PROFILE_DEFAULT: profile}
    cluster = Cluster([address], port=int(port), protocol_version=5, execution_profiles=profiles, **patience)
    try:
        yield cluster.connect()
    finally:
        cluster.shutdown()
