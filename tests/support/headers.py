"""Header blocks of any content, well-formed or not."""

from hypothesis import strategies as st

NAMES = st.sampled_from(
    ["Request-Id", "Instance-Id", "Stream", "Status", "Stream-Seq", "Stream-End", "Timeout-Ms", "Credit"]
).map("X-Mesh-{}".format)
LINES = st.lists(st.tuples(NAMES | st.text(max_size=5), st.text(max_size=12)), max_size=6)
HEADS = st.binary(max_size=200) | LINES.map(
    lambda lines: ("NATS/1.0\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines) + "\r\n").encode()
)
