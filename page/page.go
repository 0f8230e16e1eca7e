// Package page is what the reports that millrace draws for a browser have in common:
// colours in light and dark, type, tables, tiles, and how they print. A page is one file
// that needs nothing else: no network, no scripts, no fonts.
//
// It writes nothing by itself, and costs a few milliseconds a page.
package page

import (
	_ "embed" // the style
	"html/template"
)

//go:embed style.html
var style string

// Parse reads the text of a page, an html/template that has {{template "style"}} at the
// beginning of its style; it panics where the text is wrong, as all of them are part of
// the program.
func Parse(name, text string) *template.Template {
	return template.Must(template.Must(template.New(name).Parse(style)).New(name).Parse(text))
}
