"""What Triton's own schema reads of a config.pbtxt: `python triton_client.py CONFIG` prints JSON.

Runs in an environment of its own, with tritonclient and without ghostedge. Raises for a field or a
value that the schema does not know.
"""

import json
import sys

from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

with open(sys.argv[1]) as file:
    config = text_format.Parse(file.read(), model_config_pb2.ModelConfig())
print(json.dumps(json_format.MessageToDict(config, preserving_proto_field_name=True)))
