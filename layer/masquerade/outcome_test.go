package masquerade

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/millrace/millrace/test/docs"
)

// The outcomes are defined once, in masquerade.bpf.c. The table in the docs is made from
// it, and the names in metrics come from the object's BTF.
func TestOutcomesAreTheSameEverywhere(t *testing.T) {
	source, err := os.ReadFile("masquerade.bpf.c")
	must(t, err)
	spec, err := loadDatapath()
	must(t, err)
	names, err := outcomeNames(spec)
	must(t, err)
	defined := regexp.MustCompile(`OUTCOME_(\w+), +/\* (.+) \*/`).FindAllStringSubmatch(string(source), -1)
	if len(defined) != len(names) {
		t.Fatalf("%d outcomes in the source, %d in the object: run go generate", len(defined), len(names))
	}
	table := "\n| reason | means |\n|---|---|\n"
	for i, d := range defined {
		if strings.ToLower(d[1]) != names[i] {
			t.Errorf("outcome %d is %s in the source and %s in the object", i, strings.ToLower(d[1]), names[i])
		}
		table += fmt.Sprintf("| `%s` | %s |\n", names[i], d[2])
	}
	docs.Fresh(t, "../../docs/masquerade.md", "outcomes", table)
}
