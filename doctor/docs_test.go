package doctor

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
)

// The tables in the docs are made from the checks.
func TestDocsAreFresh(t *testing.T) {
	const page = "../docs/doctor.md"
	cell := func(text string) string { return strings.ReplaceAll(text, "|", `\|`) }
	checks := "\n| | finds | when | severity | looks in | where it is written |\n|---|---|---|---|---|---|\n"
	pitfalls := "\n| | |\n|---|---|\n"
	for _, c := range Checks() {
		checks += fmt.Sprintf("| %s | %s | %s | %s | %s | %s |\n", c.ID, cell(c.Title), cell(c.When), c.Severity, c.Scope, cell(c.Source))
		pitfalls += fmt.Sprintf("| %s | %s |\n", c.ID, cell(c.Pitfall))
	}
	inDocs(t, page, "checks", checks)
	inDocs(t, page, "pitfalls", pitfalls)
}

// inDocs checks, or with UPDATE_GOLDEN writes, the text between two marks.
func inDocs(t *testing.T, path, mark, want string) {
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
