"""Run by test_campaign_kills.py and test_campaign_running.py: a campaign in a process of its own, to be killed.

python tests/campaign/campaign_runner.py CAMPAIGN_JSON OUTPUT JOBS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dpsm_hf.campaign.runner.running import run_campaign
from dpsm_hf.campaign.spec.design import Budget
from tests.campaign.campaigns import make_campaign

if __name__ == "__main__":
    content = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    budget = Budget(**{**content.pop("budget"), "halving_rungs": tuple(content.pop("rungs"))})
    sys.exit(run_campaign(make_campaign(**content, budget=budget), sys.argv[2], jobs=int(sys.argv[3])))
