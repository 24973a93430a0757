"""Auth: who asks is proven, by a bearer token or a signature, and a policy says who may ask what.

Once it is enabled, nothing is allowed but what a rule allows.
"""

from oam_auth.plugin import Auth
from oam_auth.policy import Rule
from oam_auth.settings import CallerSettings, Settings, SignatureSettings, TokenSettings, User

__all__ = ["Auth", "CallerSettings", "Rule", "Settings", "SignatureSettings", "TokenSettings", "User"]
