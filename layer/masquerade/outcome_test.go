package masquerade

import (
	"testing"

	"github.com/millrace/millrace/test/docs"
)

// The outcomes are defined once, in masquerade.bpf.c. The table in the docs is made from it,
// and the names in metrics come from the object's BTF.
func TestOutcomesAreTheSameEverywhere(t *testing.T) {
	spec, err := loadDatapath()
	must(t, err)
	names, err := outcomeNames(spec)
	must(t, err)
	docs.SameWords(t, "masquerade.bpf.c", "OUTCOME_", names, "../../docs/masquerade.md", "outcomes")
}
