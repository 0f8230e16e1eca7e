// Package docs holds tables in the documentation to the code that they are made of. It
// is for tests; it writes a page only with UPDATE_GOLDEN=1, and costs a page's reading.
package docs

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
)

// Fresh checks, or with UPDATE_GOLDEN writes, what a page has between its two marks,
// "<!-- MARK: made from ... -->" and "<!-- end of MARK -->".
func Fresh(t *testing.T, path, mark, want string) {
	t.Helper()
	page, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	between := regexp.MustCompile(`(?s)(<!-- ` + mark + `:[^>]*-->\n).*?(<!-- end of ` + mark + ` -->)`)
	if !between.Match(page) {
		t.Fatalf("%s has no place for the table %q", path, mark)
	}
	fresh := between.ReplaceAllLiteral(page, []byte(between.FindStringSubmatch(string(page))[1]+want+"\n<!-- end of "+mark+" -->"))
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

// SameWords checks that the words of an enum in C, which are defined once, in a source file
// as "PREFIX_WORD, /* what it means */", are those that the object's BTF has, in order and
// in lower case, and that the table of a page (see Fresh) is made of them.
func SameWords(t *testing.T, source, prefix string, names []string, path, mark string) {
	t.Helper()
	text, err := os.ReadFile(source)
	if err != nil {
		t.Fatal(err)
	}
	defined := regexp.MustCompile(prefix+`(\w+), +/\* (.+) \*/`).FindAllStringSubmatch(string(text), -1)
	if len(defined) != len(names) {
		t.Fatalf("%d %s in %s, %d in the object: run go generate", len(defined), mark, source, len(names))
	}
	table := "\n| reason | means |\n|---|---|\n"
	for i, d := range defined {
		if strings.ToLower(d[1]) != names[i] {
			t.Errorf("%d of the %s is %s in %s and %s in the object", i, mark, strings.ToLower(d[1]), source, names[i])
		}
		table += fmt.Sprintf("| `%s` | %s |\n", names[i], d[2])
	}
	Fresh(t, path, mark, table)
}
