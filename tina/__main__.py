"""`python -m tina` is the `tina` command."""

from tina.cli import main

raise SystemExit(main())
