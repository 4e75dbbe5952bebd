"""From tensor quant attributes to the graph a runtime executes: QDQ, QOperator, integer-only, weight-only."""
