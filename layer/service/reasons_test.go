package service

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/millrace/millrace/test/docs"
)

// The reasons are defined once, in bpf/verdict.h. The table in the docs is made
// from it, and the names in metrics come from the object's BTF.
func TestReasonsAreTheSameEverywhere(t *testing.T) {
	header, err := os.ReadFile("../../bpf/verdict.h")
	if err != nil {
		t.Fatal(err)
	}
	spec, err := loadDatapath()
	if err != nil {
		t.Fatal(err)
	}
	names, err := reasonNames(spec)
	if err != nil {
		t.Fatal(err)
	}
	defined := regexp.MustCompile(`REASON_(\w+), +/\* (.+) \*/`).FindAllStringSubmatch(string(header), -1)
	if len(defined) != len(names) {
		t.Fatalf("%d reasons in the header, %d in the object: run go generate", len(defined), len(names))
	}
	table := "\n| reason | means |\n|---|---|\n"
	for i, d := range defined {
		if strings.ToLower(d[1]) != names[i] {
			t.Errorf("reason %d is %s in the header and %s in the object", i, strings.ToLower(d[1]), names[i])
		}
		table += fmt.Sprintf("| `%s` | %s |\n", names[i], d[2])
	}
	docs.Fresh(t, "../../docs/service.md", "reasons", table)
}
