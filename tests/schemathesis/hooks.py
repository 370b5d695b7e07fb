"""Lets schemathesis past the front door.

Random data alone only ever sees refusals: keys must be signed, ids must exist, tickets must be fresh. These hooks keep
accounts for the run, and turn most of the *positive* cases into requests that succeed. Negative cases are sent as
generated.
"""

import atexit
import base64
import collections
import itertools
import os
import random
import uuid

import requests
import schemathesis
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import strategies as st
from schemathesis.core.failures import AcceptedNegativeData

API = os.environ["OBSCURA_API"]
PASSWORD = "correct horse battery staple"
FIELD = 2**255 - 19
# A point of P-256, from RFC 8291.
POINT = "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4"

# Which cases are helped is decided by a generator of our own, so that a run can be repeated.
chance = random.Random(1)


def text(raw):
    return base64.b64encode(raw).decode()


class Identity:
    """An identity key that signs as libsignal does.

    XEdDSA is Ed25519 with a key that is published as its Montgomery u-coordinate. So an ordinary Ed25519 key will do:
    publish u = (1 + y) / (1 - y), and put the sign of the Edwards point, which u does not carry, into the top bit of the
    signature.
    """

    def __init__(self):
        self.private = Ed25519PrivateKey.from_private_bytes(chance.randbytes(32))
        edwards = int.from_bytes(self.private.public_key().public_bytes_raw(), "little")
        self.sign_bit, y = edwards >> 255, edwards & (2**255 - 1)
        u = (1 + y) * pow(1 - y, -1, FIELD) % FIELD
        self.public = text(b"\x05" + u.to_bytes(32, "little"))

    def sign(self, public_key):
        signature = bytearray(self.private.sign(base64.b64decode(public_key)))
        signature[63] |= self.sign_bit << 7
        return text(bytes(signature))


def distinct(prekeys):
    return list({prekey["keyId"]: prekey for prekey in prekeys}.values())


def sign_prekeys(body, identity, key_id=None):
    """Makes the prekeys of a generated body acceptable, and keeps everything else that was generated."""
    signed = body["signedPreKey"]
    signed["signature"] = identity.sign(signed["publicKey"])
    signed["keyId"] = signed["keyId"] if key_id is None else key_id
    body["oneTimePreKeys"] = distinct(body["oneTimePreKeys"])
    last_resort = body.get("pqLastResortPreKey")
    if last_resort is None:
        body.pop("pqPreKeys", None)
    else:
        last_resort["signature"] = identity.sign(last_resort["publicKey"])
    if body.get("pqPreKeys"):
        body["pqPreKeys"] = [key for key in distinct(body["pqPreKeys"]) if key["keyId"] != last_resort["keyId"]]
        for prekey in body["pqPreKeys"]:
            prekey["signature"] = identity.sign(prekey["publicKey"])
    if "identityKey" in body:
        body["identityKey"] = identity.public


def new_keys(identity):
    def prekey(key_id, size=33, prefix=b"\x05"):
        public = text(prefix + chance.randbytes(size - 1))
        return {"keyId": key_id, "publicKey": public, "signature": identity.sign(public)}

    return {
        "name": None,
        "identityKey": identity.public,
        "registrationId": chance.randint(1, 16380),
        "signedPreKey": prekey(1),
        "oneTimePreKeys": [prekey(n) for n in range(1, 4)],
        "pqLastResortPreKey": prekey(1, 1569, b"\x08"),
        "pqPreKeys": [prekey(n, 1569, b"\x08") for n in range(2, 4)],
    }


class Account:
    """A registered account with its primary device."""

    def __init__(self):
        self.username = f"s{chance.getrandbits(64):016x}"
        self.identity = Identity()
        self.signed_key_id = 1
        self.adopt(self.post("/v1/users", self.credentials() | new_keys(self.identity)))

    def adopt(self, tokens):
        self.user_id, self.device_id = tokens["userId"], tokens["deviceId"]
        self.token, self.refresh_token = tokens["token"], tokens["refreshToken"]

    def credentials(self):
        return {"username": self.username, "password": PASSWORD}

    def log_in(self):
        self.adopt(self.post("/v1/session", self.credentials() | {"deviceId": self.device_id}))

    def post(self, path, body=None):
        return self.call("POST", path, json=body).json()

    def call(self, method, path, **arguments):
        headers = {"authorization": f"Bearer {self.token}"} if hasattr(self, "token") else {}
        response = requests.request(method, API + path, headers=headers, timeout=10, **arguments)
        if not response.ok:
            raise RuntimeError(f"the set-up call {method} {path} gave {response.status_code}: {response.text}")
        return response

    def approved_link_session(self):
        link_id = self.post("/v1/link-sessions", self.credentials())["id"]
        self.call("PUT", f"/v1/link-sessions/{link_id}", data=b"parcel")
        return link_id


class World:
    """What exists on the server, as far as the cases need it."""

    def __init__(self):
        self.caller = Account()
        # For what would end the caller's own account or session.
        self.spare = Account()
        self.approved_link_id = self.caller.approved_link_session()
        self.attachment_ids = [self.caller.call("POST", "/v1/attachments", data=b"attachment").json()["id"]]
        self.send_keys = []


_world = None


def world():
    global _world
    if _world is None:
        _world = World()
    return _world


@schemathesis.auth(refresh_interval=None)
class CallerToken:
    def get(self, case, context):
        return world().caller.token

    def set(self, case, data, context):
        case.headers["authorization"] = f"Bearer {data}"


# ---- what makes a positive case succeed, by operation


def register(case):
    case.body |= {"username": f"s{chance.getrandbits(64):016x}"}
    sign_prekeys(case.body, Identity())


def reset(case):
    spare = world().spare
    spare.identity = Identity()
    case.body |= spare.credentials()
    sign_prekeys(case.body, spare.identity)


def log_in(case):
    case.body |= world().caller.credentials() | {"deviceId": world().caller.device_id}


def refresh(case):
    case.body["refreshToken"] = world().spare.refresh_token


def open_link_session(case):
    case.body |= world().caller.credentials()


def register_push(case):
    """Either a token or a subscription."""
    if case.body.get("subscription") is None:
        case.body["token"] = case.body.get("token") or "token"
        case.body["provider"] = chance.choice([None, "fcm", "apns"])
    else:
        case.body |= {"token": None, "provider": chance.choice([None, "webpush"])}
        case.body["subscription"] = {"endpoint": "https://push.example/s", "keys": {"p256dh": POINT, "auth": "A" * 22}}


# Here and below: in turn rather than at random, so that each comes up.
parcels = itertools.cycle([0, 1, 1000, 65536])
approvals = itertools.cycle(["new", "approved"])
readings = itertools.cycle(["approved", "new", "approved"])


def link_session_id(turns):
    caller = world().caller
    if next(turns) == "new":
        return caller.post("/v1/link-sessions", caller.credentials())["id"]
    return world().approved_link_id


def name_link_session(case, turns=readings):
    case.path_parameters["id"] = link_session_id(turns)


def name_link_session_in_header(case, turns=readings):
    case.headers["Obscura-Link-Id"] = link_session_id(turns)


def approve_link_session(case):
    name_link_session(case, approvals)
    case.body = chance.randbytes(next(parcels))


def approve_link_session_in_header(case):
    name_link_session_in_header(case, approvals)
    case.body = chance.randbytes(next(parcels))


def link_device(case):
    caller = world().caller
    case.body["linkSessionId"] = caller.approved_link_session()
    case.body.pop("identitySignature", None)
    sign_prekeys(case.body, caller.identity)


def delete_device(case):
    case.path_parameters["deviceId"] = chance.choice(caller_devices())


def caller_devices():
    return [device["deviceId"] for device in world().caller.call("GET", "/v1/devices").json()["devices"]]


def upload_keys(case):
    caller = world().caller
    caller.signed_key_id += 1
    sign_prekeys(case.body, caller.identity, caller.signed_key_id)


def name_user(case):
    case.path_parameters["userId"] = chance.choice([world().caller.user_id, world().spare.user_id])


def name_device(case):
    case.path_parameters |= {"userId": world().caller.user_id, "deviceId": chance.choice(caller_devices())}


def field(number, value):
    """A length-delimited protobuf field."""
    length, head = len(value), bytearray([number << 3 | 2])
    while length > 127:
        head.append(length & 127 | 128)
        length >>= 7
    return bytes(head) + bytes([length]) + value


def send(case):
    """A message to another user, or to all other devices of the caller; sometimes a repetition."""
    if world().send_keys and chance.random() < 0.3:
        case.headers["Idempotency-Key"] = chance.choice(world().send_keys)
    else:
        world().send_keys.append(case.headers["Idempotency-Key"])
    user, devices = world().spare.user_id, [world().spare.device_id]
    if chance.random() < 0.5:
        user, devices = world().caller.user_id, [d for d in caller_devices() if d != world().caller.device_id]
    message = chance.randbytes(chance.choice([1, 100, 5000]))
    submissions = [field(2, field(1, uuid.UUID(device).bytes) + field(2, message)) for device in devices]
    case.body = field(1, field(1, uuid.UUID(user).bytes) + b"".join(submissions))


def open_gateway(case):
    """A proper handshake. The answer is looked at, and the socket is dropped (`drop_if_upgraded`)."""
    case.query["ticket"] = world().caller.post("/v1/gateway/ticket")["ticket"]
    case.headers.update({"Connection": "Upgrade", "Upgrade": "websocket"})
    case.headers.update({"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": text(chance.randbytes(16))})


def drop_if_upgraded(response, **_):
    """Keeps a connection that is a WebSocket now from being used for further requests."""
    if response.status_code == 101:
        response.raw.close()


downloads = itertools.cycle(
    [
        {},
        {"Range": "bytes=0-0"},
        {"If-None-Match": '"{id}"'},
        {"Range": "bytes=9999999-"},
        {"Range": "bytes=1-", "If-None-Match": '"x"'},
        {"Range": "bytes=-3", "If-None-Match": '"x", W/"{id}"'},
        {"Range": "bytes=-3", "If-Range": '"{id}"'},
        {"Range": "bytes=-3", "If-Range": '"x"'},
        {"If-None-Match": "*"},
        {"Range": "bytes=-0"},
        {"Range": "bytes=0-0,2-2"},
        {"Range": "bytes=5-2", "If-None-Match": "{id}"},
        {"Range": "lines=1-2", "If-None-Match": '"'},
    ]
)


def name_attachment(case):
    attachment_id = chance.choice(world().attachment_ids)
    case.path_parameters["id"] = attachment_id
    for header in ("Range", "If-Range", "If-None-Match"):
        case.headers.pop(header, None)
    case.headers.update({header: value.format(id=attachment_id) for header, value in next(downloads).items()})


HELP = {
    "POST /v1/users": register,
    "POST /v1/users/reset": reset,
    "POST /v1/session": log_in,
    "POST /v1/session/refresh": refresh,
    "POST /v1/link-sessions": open_link_session,
    "PUT /v1/link-sessions": approve_link_session_in_header,
    "GET /v1/link-sessions": name_link_session_in_header,
    "PUT /v1/link-sessions/{id}": approve_link_session,
    "GET /v1/link-sessions/{id}": name_link_session,
    "POST /v1/devices": link_device,
    "DELETE /v1/devices/{deviceId}": delete_device,
    "POST /v1/keys": upload_keys,
    "GET /v1/keys/{userId}": name_user,
    "GET /v1/keys/{userId}/devices/{deviceId}": name_device,
    "POST /v1/messages": send,
    "GET /v1/gateway": open_gateway,
    "PUT /v1/push-token": register_push,
    "GET /v1/attachments/{id}": name_attachment,
}

# How often each operation answered with each status.
seen = collections.defaultdict(collections.Counter)
# The statuses that each operation should answer with at least once: a run that only sees refusals proves little.
successes = {}


@schemathesis.hook
def after_load_schema(context, schema):
    for operation in (result.ok() for result in schema.get_all_operations()):
        documented = [int(status) for status in operation.definition.raw["responses"]]
        successes[operation.label] = [status for status in documented if status < 400]


@atexit.register
def write_statuses():
    with open(os.environ["OBSCURA_STATUSES"], "w") as out:
        for label, expected in successes.items():
            counted = ", ".join(f"{status} ({count})" for status, count in sorted(seen[label].items()))
            never = ", ".join(str(status) for status in expected if status not in seen[label])
            print(f"{label}: {counted}" + (f" - never {never}" if never else ""), file=out)


TAKES_BYTES = ("POST /v1/messages", "PUT /v1/link-sessions/{id}")


@schemathesis.hook
def before_call(context, case, kwargs):
    label = case.operation.label
    if case.meta is None or not case.meta.generation.mode.is_positive or case.method != case.operation.method.upper():
        return
    if label in HELP and chance.random() < 0.75:
        HELP[label](case)
    if label == "GET /v1/gateway":
        kwargs["hooks"] = {"response": drop_if_upgraded}


@schemathesis.hook
def after_call(context, case, response):
    """Remembers what was made, and replaces what was ended."""
    if case.method == case.operation.method.upper():
        seen[case.operation.label][response.status_code] += 1
    label, made = case.operation.label, response.status_code in (200, 201)
    if label == "DELETE /v1/session" and response.status_code == 204:
        world().caller.log_in()
    elif label == "POST /v1/attachments" and made:
        world().attachment_ids.append(response.json()["id"])
    elif label in ("POST /v1/session", "POST /v1/users/reset", "POST /v1/session/refresh") and made:
        tokens = response.json()
        for account in (world().caller, world().spare):
            if account.user_id == tokens["userId"]:
                account.adopt(tokens)


@schemathesis.hook
def filter_failure(context, failure, case, response):
    """Drops a complaint that means nothing: where a body is opaque bytes, any bytes are valid, none included."""
    if not isinstance(failure, AcceptedNegativeData) or case.operation.label not in TAKES_BYTES:
        return True
    return case.operation.label == "POST /v1/messages" and not is_uuid(case.headers.get("Idempotency-Key"))


def is_uuid(value):
    try:
        return bool(uuid.UUID(value))
    except (AttributeError, TypeError, ValueError):
        return False


# Bodies of a send as random data would not make them: well-formed protobuf with ids of all sizes, beside plain noise.
ids = st.one_of(st.binary(min_size=16, max_size=16), st.binary(max_size=20))
submissions = st.builds(lambda device, message: field(1, device) + field(2, message), ids, st.binary(max_size=64))
recipients = st.builds(
    lambda user, messages: field(1, user) + b"".join(field(2, m) for m in messages),
    ids,
    st.lists(submissions, max_size=3),
)
requests_to_send = st.lists(recipients, max_size=3).map(lambda parts: b"".join(field(1, part) for part in parts))
schemathesis.openapi.media_type("application/x-protobuf", st.one_of(requests_to_send, st.binary(max_size=64)))
