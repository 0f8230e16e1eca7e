package doctor

import (
	"fmt"
	"strings"
	"testing"

	"github.com/millrace/millrace/test/docs"
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
	docs.Fresh(t, page, "checks", checks)
	docs.Fresh(t, page, "pitfalls", pitfalls)
}
