package service

import (
	"testing"

	"github.com/millrace/millrace/test/docs"
)

// The reasons are defined once, in bpf/verdict.h. The table in the docs is made
// from it, and the names in metrics come from the object's BTF.
func TestReasonsAreTheSameEverywhere(t *testing.T) {
	spec, err := loadDatapath()
	if err != nil {
		t.Fatal(err)
	}
	names, err := reasonNames(spec)
	if err != nil {
		t.Fatal(err)
	}
	docs.SameWords(t, "../../bpf/verdict.h", "REASON_", names, "../../docs/service.md", "reasons")
}
