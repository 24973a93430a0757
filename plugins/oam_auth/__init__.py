"""Auth: callers are verified by bearer tokens or signatures, and a policy permits their requests.

Once it is enabled, only requests that a rule permits are admitted.
"""

from oam_auth.plugin import Auth
from oam_auth.policy import Rule
from oam_auth.settings import CallerSettings, Settings, SignatureSettings, TokenSettings, User

__all__ = ["Auth", "CallerSettings", "Rule", "Settings", "SignatureSettings", "TokenSettings", "User"]
