"""What tests share: ranks, oracles, cases, stand-ins. Nothing here is collected."""
