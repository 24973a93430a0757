"""The same strangers at every run, and no deadline: a busy machine is no bug."""

from hypothesis import settings

settings.register_profile("openagentmesh", max_examples=60, deadline=None, derandomize=True, database=None)
settings.load_profile("openagentmesh")
