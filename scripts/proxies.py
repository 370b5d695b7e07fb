"""What scripts/proxies runs: a server, three proxies in front of it, and clients that are in the way of themselves."""

import base64
import hashlib
import http.client
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

BINARY = os.environ.get("OBSCURA_SERVER_BINARY", "target/debug/obscura-server")
FIELD = 2**255 - 19
BODY_BYTES = 5_000_000
REPEATS = 20

NGINX = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{ worker_connections 512; }}
http {{
  access_log off; client_max_body_size 64m;
  client_body_temp_path {folder}/n1; proxy_temp_path {folder}/n2; fastcgi_temp_path {folder}/n3;
  uwsgi_temp_path {folder}/n4; scgi_temp_path {folder}/n5;
  map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://127.0.0.1:{server};
      proxy_http_version 1.1;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection $connection_upgrade;
      proxy_set_header X-Forwarded-For $remote_addr;
      proxy_read_timeout 10m; proxy_send_timeout 10m; send_timeout 10m; client_body_timeout 10m;
      proxy_request_buffering {buffering};
    }}
  }}
}}
"""
HAPROXY = """
global
  maxconn 512
defaults
  mode http
  timeout connect 5s
  timeout client 10m
  timeout server 10m
  timeout tunnel 1h
  option forwardfor
frontend all
  bind 127.0.0.1:{port}
  default_backend server
backend server
  server one 127.0.0.1:{server}
"""
CADDY = """
{{
  admin off
  auto_https off
}}
http://127.0.0.1:{port} {{
  reverse_proxy 127.0.0.1:{server}
}}
"""
NODE = """
const [url, method, headers] = [process.argv[1], process.argv[2], JSON.parse(process.argv[3])];
const tries = Number(process.argv[4]), body = new Uint8Array(Number(process.argv[5]));
const seen = [];
for (let n = 0; n < tries; n++) {
  try {
    const answer = await fetch(url, { method, headers, body, signal: AbortSignal.timeout(60000) });
    await answer.arrayBuffer();
    seen.push(answer.status);
  } catch (error) { seen.push(String(error.cause?.code ?? error.message)); }
}
console.log(JSON.stringify(seen));
"""


def free_port():
    while True:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


class Scene:
    """A server and the ways to it: by name, each with a port."""

    def __init__(self, folder):
        self.folder, self.processes, self.ways = folder, [], {}

    def start(self, name, port, command, **arguments):
        with open(f"{self.folder}/{name}.out", "wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **arguments)
        self.processes.append(process)
        end = time.monotonic() + 60
        while time.monotonic() < end and process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.05)
        with open(f"{self.folder}/{name}.out", encoding="utf-8", errors="replace") as output:
            sys.exit(f"{name} did not start:\n{output.read()}")

    def open(self):
        server = free_port()
        self.start("server", server, [
            BINARY, f"--data-dir={self.folder}/data", "--server-host=127.0.0.1", f"--server-port={server}",
            f"--mgmt-port={free_port()}", "--rate-limit-per-second=10000", "--rate-limit-burst=10000",
            "--auth-rate-limit-per-second=10000", "--auth-rate-limit-burst=10000",
        ])
        self.ways["direct"] = server
        for name, text, command in [
            ("nginx", NGINX.replace("{buffering}", "on"), ["nginx", "-c", "{file}", "-e", "{folder}/start.log"]),
            ("nginx-streaming", NGINX.replace("{buffering}", "off"), ["nginx", "-c", "{file}", "-e", "{folder}/start.log"]),
            ("haproxy", HAPROXY, ["haproxy", "-db", "-f", "{file}"]),
            ("caddy", CADDY, ["caddy", "run", "--adapter", "caddyfile", "--config", "{file}"]),
        ]:
            port, folder = free_port(), f"{self.folder}/{name}"
            os.mkdir(folder)
            with open(f"{folder}/config", "w", encoding="utf-8") as file:
                file.write(text.format(port=port, server=server, folder=folder))
            command = [word.format(file=f"{folder}/config", folder=folder) for word in command]
            self.start(name, port, command, env={**os.environ, "HOME": folder})
            self.ways[name] = port

    def close(self):
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def by_curl(port, method, path, headers, tries):
    words = [word for name, value in headers.items() for word in ("-H", f"{name}: {value}")]
    with tempfile.NamedTemporaryFile() as body:
        body.write(bytes(BODY_BYTES))
        body.flush()
        command = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-m", "60", "-X", method, *words, "-H", "Expect:",
                   "--data-binary", f"@{body.name}", f"http://127.0.0.1:{port}{path}"]
        return [int(subprocess.run(command, capture_output=True, check=False).stdout or 0) for _ in range(tries)]


def by_node(port, method, path, headers, tries):
    command = ["node", "--input-type=module", "-e", NODE, "--", f"http://127.0.0.1:{port}{path}", method,
               json.dumps(headers), str(tries), str(BODY_BYTES)]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def by_http_client(port, method, path, headers, tries):
    def one():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request(method, path, bytes(BODY_BYTES), headers)
            return connection.getresponse().status
        except OSError as error:
            return type(error).__name__
        finally:
            connection.close()

    return [one() for _ in range(tries)]


def by_urllib(port, method, path, headers, tries):
    def one():
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", bytes(BODY_BYTES), headers, method=method)
        try:
            return urllib.request.urlopen(request, timeout=60).status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError as error:
            return type(error).__name__

    return [one() for _ in range(tries)]


def refusals():
    """One of each kind and route that is refused before a body of this size is read."""
    octets, words = {"content-type": "application/octet-stream"}, {"content-type": "application/json"}
    void = {"authorization": "Bearer void"}
    yield 401, "POST", "/v1/attachments", octets | void
    yield 401, "POST", "/v1/messages", octets | void
    yield 401, "POST", "/v1/keys", words | void
    yield 401, "PUT", "/v1/push-token", words | void
    yield 401, "PUT", "/v1/link-sessions/x", octets | void
    yield 404, "POST", "/v1/nothing", octets
    yield 405, "PUT", "/v1/users", words
    yield 413, "POST", "/v1/users", words
    yield 413, "POST", "/v1/session/refresh", words
    yield 415, "POST", "/v1/devices", octets


def early(scene):
    """Each way and client: every refusal in turn until each pair has had its tries."""
    failed = 0
    for way, port in scene.ways.items():
        for client in (by_curl, by_node, by_http_client, by_urllib):
            wrong = []
            for expected, method, path, headers in refusals():
                seen = client(port, method, path, headers, TRIES)
                wrong += [(method, path, status) for status in seen if status != expected]
            total = TRIES * len(list(refusals()))
            failed += len(wrong)
            print(f"{way:16} {client.__name__[3:]:12} {total - len(wrong)} of {total} {wrong[:3] or ''}", flush=True)
    return failed == 0


def text(raw):
    return base64.b64encode(bytes(raw)).decode()


class Account:
    """A registered device."""

    def __init__(self, port):
        private = Ed25519PrivateKey.generate()
        edwards = int.from_bytes(private.public_key().public_bytes_raw(), "little")
        sign_bit, y = edwards >> 255, edwards & (2**255 - 1)
        public = b"\x05" + ((1 + y) * pow(1 - y, -1, FIELD) % FIELD).to_bytes(32, "little")
        signed = b"\x05" + os.urandom(32)
        signature = bytearray(private.sign(signed))
        signature[63] |= sign_bit << 7
        body = {
            "username": f"p{uuid.uuid4().hex[:16]}", "password": "a long enough password", "name": None,
            "identityKey": text(public), "registrationId": 1,
            "signedPreKey": {"keyId": 1, "publicKey": text(signed), "signature": text(signature)}, "oneTimePreKeys": [],
        }
        self.port = port
        answer = json.loads(self.call("POST", "/v1/users", json.dumps(body).encode(), {"content-type": "application/json"}))
        self.token, self.device = answer["token"], answer["deviceId"]
        claims = self.token.split(".")[1]
        self.user = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["sub"]

    def call(self, method, path, body=None, headers=None):
        headers = dict(headers or {})
        if hasattr(self, "token"):
            headers["authorization"] = f"Bearer {self.token}"
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, headers, method=method)
        return urllib.request.urlopen(request, timeout=60).read()

    def send(self, other, message):
        def field(number, value):
            length, size = b"", len(value)
            while size > 127:
                length, size = length + bytes([size & 127 | 128]), size >> 7
            return bytes([number << 3 | 2]) + length + bytes([size]) + value

        submission = field(1, uuid.UUID(other.device).bytes) + field(2, message)
        body = field(1, field(1, uuid.UUID(other.user).bytes) + field(2, submission))
        self.call("POST", "/v1/messages", body, {
            "idempotency-key": str(uuid.uuid4()), "content-type": "application/x-protobuf"})


def download_slowly(port, account, path, rate, expected):
    """With a small receive buffer, since curl's limit lets the first megabytes through at once."""
    with slow_socket(port) as stream:
        stream.sendall((f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
                        f"Authorization: Bearer {account.token}\r\n\r\n").encode())
        seen = bytearray()
        read_slowly(stream, rate, 1 << 62, seen)
    head, _, body = bytes(seen).partition(b"\r\n\r\n")
    return head.startswith(b"HTTP/1.1 200") and hashlib.sha256(body).digest() == expected


def slow_socket(port):
    stream = socket.socket()
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 10)
    stream.settimeout(240)
    stream.connect(("127.0.0.1", port))
    return stream


def curl_upload(port, account, file, rate):
    command = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--limit-rate", str(rate), "-H", "Expect:",
               "-H", f"authorization: Bearer {account.token}", "--data-binary", f"@{file}",
               f"http://127.0.0.1:{port}/v1/attachments"]
    return subprocess.run(command, capture_output=True, check=False).stdout == b"201"


def read_slowly(stream, rate, wanted, seen=None):
    """Reads at this rate in steps of a tenth of a second, and answers how many bytes came before the end."""
    total, begun = 0, time.monotonic()
    while total < wanted:
        piece = stream.recv(max(rate // 10, 1))
        if not piece:
            break
        total += len(piece)
        if seen is not None:
            seen += piece
        ahead = total / rate - (time.monotonic() - begun)
        if ahead > 0:
            time.sleep(ahead)
    return total


def gateway_slowly(port, account, rate, wanted):
    ticket = json.loads(account.call("POST", "/v1/gateway/ticket"))["ticket"]
    stream = slow_socket(port)
    key = base64.b64encode(os.urandom(16)).decode()
    stream.sendall((f"GET /v1/gateway?ticket={ticket} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                    f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n").encode())
    try:
        return read_slowly(stream, rate, wanted) >= wanted
    except OSError as error:
        print(f"  the gateway socket broke: {error}")
        return False
    finally:
        stream.close()


def slow(scene, whole):
    """All of them at once, since they wait most of the time."""
    size, rate = (52_000_000, 100_000) if whole else (8_000_000, 200_000)
    up, up_rate = (50 << 20, 350_000) if whole else (6_000_000, 200_000)
    messages, socket_rate = (12, 20_000) if whole else (2, 60_000)
    direct = scene.ways["direct"]
    alice, content = Account(direct), os.urandom(size)
    with open(f"{scene.folder}/upload", "wb") as file:
        file.write(os.urandom(up))
    stored = json.loads(alice.call("POST", "/v1/attachments", content))["id"]
    expected, results, threads = hashlib.sha256(content).digest(), {}, []

    def run(name, work, *arguments):
        def task():
            begun = time.monotonic()
            results[name] = work(*arguments)
            print(f"{name:32} {'complete' if results[name] else 'BROKEN'} after {time.monotonic() - begun:.0f} s", flush=True)

        threads.append(threading.Thread(target=task))
        threads[-1].start()

    for way, port in scene.ways.items():
        if way == "nginx-streaming":
            continue
        run(f"{way}: {size} down at {rate}", download_slowly, port, alice, f"/v1/attachments/{stored}", rate, expected)
        run(f"{way}: {up} up at {up_rate}", curl_upload, port, alice, f"{scene.folder}/upload", up_rate)
        bob = Account(direct)
        for _ in range(messages):
            alice.send(bob, os.urandom(1 << 20))
        run(f"{way}: {messages} MiB by socket at {socket_rate}", gateway_slowly, port, bob, socket_rate, messages << 20)
    for thread in threads:
        thread.join()
    return all(results.values())


with tempfile.TemporaryDirectory() as scratch:
    TRIES = int(os.environ.get("OBSCURA_PROXIES_TRIES", REPEATS))
    stage = Scene(scratch)
    try:
        stage.open()
        holds = early(stage) if sys.argv[1] == "early" else slow(stage, "whole" in sys.argv[2:])
    finally:
        stage.close()
sys.exit(0 if holds else 1)
