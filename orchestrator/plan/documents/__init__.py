"""What the verbs `plan`, `status` and `ledger` say, as JSON documents."""
