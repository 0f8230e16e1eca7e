package service

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
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
	inDocs(t, "../../docs/service.md", "reasons", table)
}

// inDocs checks, or with UPDATE_GOLDEN writes, the text between two marks.
func inDocs(t *testing.T, path, mark, want string) {
	t.Helper()
	page, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	between := regexp.MustCompile(`(?s)(<!-- ` + mark + `:[^>]*-->\n).*?(<!-- end of ` + mark + ` -->)`)
	fresh := between.ReplaceAll(page, []byte("${1}"+want+"\n${2}"))
	if string(fresh) == string(page) {
		return
	}
	if os.Getenv("UPDATE_GOLDEN") == "" {
		t.Fatalf("%s: the table %q is stale: run this test with UPDATE_GOLDEN=1", path, mark)
	}
	if err := os.WriteFile(path, fresh, 0o644); err != nil {
		t.Fatal(err)
	}
}
