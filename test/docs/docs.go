// Package docs holds tables in the documentation to the code that they are made of. It
// is for tests; it writes a page only with UPDATE_GOLDEN=1, and costs a page's reading.
package docs

import (
	"os"
	"regexp"
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
