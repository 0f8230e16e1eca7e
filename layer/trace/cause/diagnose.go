package cause

// Diagnose names the causes of what the evidence holds.
func Diagnose(e *Evidence) []Verdict { return nil }
