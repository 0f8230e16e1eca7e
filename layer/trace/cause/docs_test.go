package cause

import (
	"go/ast"
	"go/parser"
	"go/token"
	"slices"
	"strconv"
	"testing"

	"github.com/millrace/millrace/test/docs"
)

// The list in the docs is made from All, and All has each of the constants.
func TestDocsHaveEveryCause(t *testing.T) {
	table := "\n| cause | is | told by |\n|---|---|---|\n"
	var listed []string
	for _, k := range All() {
		listed = append(listed, k.ID)
		table += "| `" + k.ID + "` | " + k.Says + " | " + k.Signs + " |\n"
	}
	docs.Fresh(t, "../../../docs/causes.md", "causes", table)
	for _, id := range constants(t) {
		if !slices.Contains(listed, id) {
			t.Errorf("%s is not in All", id)
		}
	}
}

// constants are the identifiers of known.go.
func constants(t *testing.T) (ids []string) {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "known.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(file, func(n ast.Node) bool {
		if literal, ok := n.(*ast.BasicLit); ok && literal.Kind == token.STRING {
			id, _ := strconv.Unquote(literal.Value)
			ids = append(ids, id)
		}
		return true
	})
	if len(ids) < 40 {
		t.Fatalf("only %d causes found", len(ids))
	}
	return ids
}
