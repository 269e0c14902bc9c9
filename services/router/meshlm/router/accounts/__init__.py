"""What may be used, by whom, and what was: limits, budgets and money, reserved and settled in one ledger."""
