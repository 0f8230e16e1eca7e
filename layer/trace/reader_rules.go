package trace

import "github.com/millrace/millrace/layer/trace/cause"

func (r *Reader) readRules(n Namespace) []cause.Rule { return nil }

// counted joins two readings of the same rules: what each has counted before and after.
func counted(before, after []cause.Rule) []cause.Rule { return after }
