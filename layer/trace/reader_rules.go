package trace

import "github.com/millrace/millrace/layer/trace/cause"

func (r *Reader) readRules(n Namespace) []cause.Rule { return nil }

// bothCounts joins two readings of the same rules: what each has counted before and after.
func bothCounts(before, after []cause.Rule) []cause.Rule { return after }
