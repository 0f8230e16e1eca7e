// Package page is what tests of pages for a browser have in common. It writes nothing.
package page

import (
	"encoding/xml"
	"errors"
	"io"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// refers is what makes a browser fetch something, or tell somebody.
var refers = regexp.MustCompile(`url\(|@import`)

// Alone parses a page strictly (every element is closed where it should be, every
// attribute is quoted), and finds what it would load or run: it must need nothing else.
// It returns how many there are of each element.
func Alone(t *testing.T, page string) map[string]int {
	t.Helper()
	count := map[string]int{}
	decoder := xml.NewDecoder(strings.NewReader(page))
	decoder.Entity = xml.HTMLEntity
	for {
		token, err := decoder.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			line, column := decoder.InputPos()
			t.Fatalf("the page is not well-formed at line %d, column %d: %v", line, column, err)
		}
		element, ok := token.(xml.StartElement)
		if !ok {
			continue
		}
		count[element.Name.Local]++
		for _, a := range element.Attr {
			alone(t, element.Name.Local, a)
		}
	}
	for _, name := range []string{"script", "link", "img", "image", "iframe", "object", "use", "foreignObject"} {
		if count[name] > 0 {
			t.Errorf("the page has %d <%s>", count[name], name)
		}
	}
	if outside := refers.FindString(page); outside != "" {
		t.Errorf("the page refers to something outside: %q", outside)
	}
	return count
}

func alone(t *testing.T, element string, a xml.Attr) {
	t.Helper()
	name := a.Name.Local
	if slices.Contains([]string{"href", "src", "srcset", "data", "action", "poster"}, name) || strings.HasPrefix(name, "on") {
		t.Errorf("<%s> has %s=%q: the page must need nothing else", element, name, a.Value)
	}
	if name == "d" || name == "transform" || name == "class" {
		for _, wrong := range []string{"NaN", "Inf", "ZgotmplZ"} {
			if strings.Contains(a.Value, wrong) {
				t.Errorf("<%s> has %s=%q", element, name, a.Value)
			}
		}
	}
}
