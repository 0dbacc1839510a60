"""The command line: one file for each verb, which calls a public function."""
