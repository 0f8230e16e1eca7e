package bench

import (
	"errors"
	"fmt"
	"html"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	testpage "github.com/millrace/millrace/test/page"
)

// evil is text from outside that must stay text.
const evil = `<script>alert("1")</script>&'`

// pageOf writes the page of a report.
func pageOf(t *testing.T, report *Report) string {
	t.Helper()
	var text strings.Builder
	if err := report.WriteHTML(&text); err != nil {
		t.Fatal(err)
	}
	return text.String()
}

func TestPageIsWellFormedAndAlone(t *testing.T) {
	report := example()
	report.Header.Command, report.Header.Time = "millrace bench services --html "+evil, time.Date(2026, 2, 3, 4, 5, 0, 0, time.UTC)
	report.Header.Machine, report.Header.Settings["rounds"] = evil, evil
	report.Warnings, report.Skipped[0].Reason = []string{evil}, evil
	report.Rows[0].Variant, report.Rows[0].Unit = evil, evil
	page := pageOf(t, report)
	count := testpage.Alone(t, page)
	if outside := regexp.MustCompile(`https?:|//[a-z]`).FindString(page); outside != "" {
		t.Errorf("the page refers to something outside: %q", outside)
	}
	if count["svg"] != 7 || count["table"] != 4 {
		t.Errorf("%d plots and %d tables, want 7 and 4", count["svg"], count["table"])
	}
	if got, want := strings.Count(page, html.EscapeString(evil)), 6; got < want {
		t.Errorf("what came from outside is in the page %d times, want it at least %d times, as text", got, want)
	}
	for _, want := range []string{"3 February 2026, 04:05 UTC", "6.1.0", "2 processors", "go1.26", "prefers-color-scheme: dark", "@media print"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
}

// Every row of the report is a row of a table, with its unit and its figures.
func TestPageHoldsEveryRow(t *testing.T) {
	report := example()
	page := pageOf(t, report)
	_, all, found := strings.Cut(page, "<summary>All figures</summary>")
	if !found || strings.Count(all, "<tr") != 1+len(report.Rows) {
		t.Fatalf("the table of all figures has %d lines, want a head and %d rows", strings.Count(all, "<tr"), len(report.Rows))
	}
	for _, row := range report.Rows {
		var cells strings.Builder
		for i, cell := range []string{row.Variant, thousands(row.Services), orDash(row.Position), row.Metric, row.Unit, strconv.FormatFloat(row.Median, 'f', -1, 64)} {
			cells.WriteString([]string{"<td>", `<td class="n">`}[i/5] + cell + "</td>")
		}
		if !strings.Contains(all, cells.String()) {
			t.Errorf("no line of the table begins with %s", &cells)
		}
		if row.Ratio != nil && !strings.Contains(all, row.Ratio.String()) || row.Growth != nil && !strings.Contains(all, row.Growth.String()) {
			t.Errorf("%+v: its ratios are not in the table", row)
		}
	}
}

// One number of Services, one variant, too few rounds: there is a page for what
// there is.
func TestPageOfLittle(t *testing.T) {
	report := example()
	report.Rows = slices.DeleteFunc(report.Rows, func(row Row) bool { return row.Services != 10 || row.Variant == Millrace })
	page := pageOf(t, report)
	testpage.Alone(t, page)
	if strings.Contains(page, "NaN") || strings.Contains(page, "to itself with") || !strings.Contains(page, ">iptables-nft, last</text>") {
		t.Errorf("the page of one number of Services is\n%s", page)
	}
	report.Rows = nil
	testpage.Alone(t, pageOf(t, report))
}

func TestPageSaysThatItCouldNotBeWritten(t *testing.T) {
	if err := example().WriteHTML(fullDisk{}); !errors.Is(err, errFull) {
		t.Errorf("WriteHTML onto a full disk returned %v", err)
	}
}

// A plot whose labels cover each other, or stand outside, cannot be read.
func TestLabelsDoNotCoverEachOther(t *testing.T) {
	p := plot{reference: "1", format: func(v float64) string { return fmt.Sprint(v) }}
	for i := range 10 {
		l := line{name: fmt.Sprintf("iptables-nft, %d", i), variant: IptablesNft}
		for _, services := range []int{10, 1000, 10_000} {
			l.points = append(l.points, point{services: services, value: 1.2 + float64(i)/1000})
		}
		p.lines = append(p.lines, l)
	}
	drawing := p.draw()
	for i, a := range drawing.Lines {
		if a.Label.Y < labelHeight/2 || a.Label.Y > axesBottom {
			t.Errorf("the label %q stands at %v, outside the plot", a.Label.Text, a.Label.Y)
		}
		for _, b := range drawing.Lines[i+1:] {
			if apart := a.Label.Y - b.Label.Y; apart < labelHeight && apart > -labelHeight {
				t.Errorf("the labels %q and %q are only %v apart", a.Label.Text, b.Label.Text, apart)
			}
		}
	}
}

func TestAxesHaveRoundTicks(t *testing.T) {
	for want, s := range map[string]scale{
		"[1 1.5 2 2.5 3]":              {0, 1, 0.95, 3.1},
		"[1 10 100 1000 10000 100000]": {0, 1, 0.9, 150_000},
		"[1 3 10 30 100 300]":          {0, 1, 0.9, 400},
		"[1 2 5 10]":                   {0, 1, 0.9, 11},
		"[0.95 1 1.05]":                {0, 1, 0.93, 1.07},
	} {
		if got := fmt.Sprint(s.ticks()); got != want {
			t.Errorf("an axis from %v to %v has the ticks %s, want %s", s.low, s.high, got, want)
		}
	}
}

func TestCommandLineCanBeTypedAgain(t *testing.T) {
	got := commandLine([]string{"/somewhere/bin/millrace", "bench", "--services", "10,1000", "--html", "it's here.html", ""})
	if want := `millrace bench --services 10,1000 --html 'it'\''s here.html' ''`; got != want {
		t.Errorf("the command is %s, want %s", got, want)
	}
}
