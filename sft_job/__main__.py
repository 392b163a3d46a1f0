"""`python -m sft_job` is `sft-job`."""

import sys

from sft_job.cli import main

sys.exit(main())
