// Command run calls `go test -json` with the arguments it is given and shows
// people what matters: a line a package, the whole output of what failed, what
// is still running, and at the end how many tests passed, failed and were
// skipped.
//
// A test that skips does not test. So each skip must be allowed, by name and
// reason, in a file of lines
//
//	PACKAGE TEST reason, or a part of it
//
// where * in the names stands for any text. A skip that is not in it ends the
// run with status 1, like a failure, and so does a package that does not build.
// It writes nothing and costs nothing beside the tests.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"
	"sync"
	"time"
)

// event is what `go test -json` writes (go doc test2json, go help buildjson).
type event struct {
	Action, Package, ImportPath, Test, Output string
	Elapsed                                   float64
}

func main() {
	allowed := flag.String("allowed-skips", "", "file of the skips that are allowed")
	folder := flag.String("C", "", "run go test in this folder, of another module")
	verbose := flag.Bool("v", false, "show the output of tests that pass too")
	flag.Parse()
	r := &run{out: os.Stdout, verbose: *verbose, running: map[string]time.Time{}, output: map[string]*strings.Builder{}}
	if *allowed != "" {
		text, err := os.ReadFile(*allowed)
		if err != nil {
			fmt.Fprintln(os.Stderr, "test/run: read allowed skips:", err)
			os.Exit(2)
		}
		r.allowed = parseAllowed(string(text))
	}
	command := exec.Command("go", append([]string{"test", "-json"}, flag.Args()...)...)
	command.Dir, command.Stderr = *folder, os.Stderr
	events, err := command.StdoutPipe()
	if err == nil {
		err = command.Start()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "test/run: start go test:", err)
		os.Exit(2)
	}
	go r.heartbeat(20 * time.Second)
	r.read(events)
	broken := command.Wait() != nil
	if !r.summary() || broken {
		os.Exit(1)
	}
}

// run gathers what the tests say.
type run struct {
	out     io.Writer
	verbose bool
	allowed []skip

	mutex                   sync.Mutex
	running                 map[string]time.Time        // test -> since when
	output                  map[string]*strings.Builder // test, package or build -> what it said
	passed, failed, skipped int
	failures                []string
	skips, unwanted         []skip
}

// skip is a test that was skipped, or may be: then its strings are patterns.
type skip struct{ folder, test, reason string }

// parseAllowed reads the file of allowed skips; # begins a comment.
func parseAllowed(text string) (allowed []skip) {
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		words := strings.Fields(line)
		if len(words) >= 3 {
			allowed = append(allowed, skip{words[0], words[1], strings.Join(words[2:], " ")})
		}
	}
	return allowed
}

func (r *run) isAllowed(s skip) bool {
	return slices.ContainsFunc(r.allowed, func(a skip) bool {
		return matches(a.folder, s.folder) && matches(a.test, s.test) && strings.Contains(s.reason, a.reason)
	})
}

// matches is path.Match in which * also stands for slashes.
func matches(pattern, name string) bool {
	const slash = "\x00"
	ok, err := path.Match(strings.ReplaceAll(pattern, "/", slash), strings.ReplaceAll(name, "/", slash))
	return err == nil && ok
}

func (r *run) read(events io.Reader) {
	lines := bufio.NewReader(events)
	for {
		line, err := lines.ReadBytes('\n')
		var e event
		if json.Unmarshal(line, &e) == nil {
			r.take(e)
		} else if len(line) > 0 {
			r.print(string(line))
		}
		if err != nil {
			return
		}
	}
}

func (r *run) print(text string) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	fmt.Fprint(r.out, text)
}

// take takes one event.
func (r *run) take(e event) {
	name := strings.TrimSpace(e.Package + " " + e.Test)
	switch e.Action {
	case "run":
		r.mutex.Lock()
		r.running[name] = time.Now()
		r.mutex.Unlock()
	case "output":
		r.say(name, e)
	case "build-output":
		r.print(e.Output)
	case "build-fail":
		r.failures = append(r.failures, "build of "+e.ImportPath)
	case "pass", "fail", "skip":
		r.ended(name, e)
	}
}

// say keeps what a test says, and shows what a package says about itself.
func (r *run) say(name string, e event) {
	if e.Test == "" {
		if isSummary(e.Output) {
			r.print(e.Output)
		} else if e.Output != "PASS\n" && e.Output != "FAIL\n" && !strings.HasPrefix(e.Output, "?   \t") {
			r.keep(name, e.Output)
		}
		return
	}
	if r.verbose {
		r.print(e.Output)
	}
	r.keep(name, e.Output)
}

func (r *run) keep(name, text string) {
	if r.output[name] == nil {
		r.output[name] = &strings.Builder{}
	}
	r.output[name].WriteString(text)
}

// isSummary says whether a line is that of a package: "ok  	path	1.2s".
func isSummary(line string) bool {
	return strings.HasPrefix(line, "ok  \t") || strings.HasPrefix(line, "FAIL\t")
}

// cutOff shows what those tests of a package said that did not end: in one of them is why
// its process did (a panic, an exit).
func (r *run) cutOff(in string) {
	r.mutex.Lock()
	var cut []string
	for name := range r.running {
		if strings.HasPrefix(name, in+" ") {
			cut = append(cut, name)
			delete(r.running, name)
		}
	}
	r.mutex.Unlock()
	slices.Sort(cut)
	for _, name := range cut {
		r.failures = append(r.failures, name+" (did not end)")
		if kept := r.output[name]; kept != nil && !r.verbose {
			r.print(kept.String())
		}
		delete(r.output, name)
	}
}

// ended counts a test, and shows what it said if it failed. Of a package, which
// is not counted, only the failure outside of its tests is shown (a panic).
func (r *run) ended(name string, e event) {
	r.mutex.Lock()
	delete(r.running, name)
	r.mutex.Unlock()
	text := ""
	if kept := r.output[name]; kept != nil {
		text = kept.String()
		delete(r.output, name)
	}
	if e.Action == "fail" {
		r.failures = append(r.failures, name)
		if !r.verbose || e.Test == "" {
			r.print(text)
		}
	}
	if e.Test == "" {
		if e.Action == "fail" {
			r.cutOff(e.Package)
		}
		return
	}
	switch e.Action {
	case "pass":
		r.passed++
	case "fail":
		r.failed++
	case "skip":
		r.skipped++
		s := skip{e.Package, e.Test, reason(text)}
		if r.isAllowed(s) {
			r.skips = append(r.skips, s)
		} else {
			r.unwanted = append(r.unwanted, s)
		}
	}
}

// reason is what a skipped test gave as reason: its output without the lines
// about its state.
func reason(text string) string {
	var words []string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "=== ") && !strings.HasPrefix(line, "--- ") {
			words = append(words, line)
		}
	}
	return strings.Join(words, " ")
}

// heartbeat says what takes long, so that nobody waits in front of silence.
func (r *run) heartbeat(every time.Duration) {
	for range time.Tick(every) {
		r.mutex.Lock()
		for _, name := range slices.Sorted(maps.Keys(r.running)) {
			if since := time.Since(r.running[name]); since > every && !r.hasParts(name) {
				fmt.Fprintf(r.out, "... %s runs for %v\n", name, since.Round(time.Second))
			}
		}
		r.mutex.Unlock()
	}
}

// hasParts says that a part of a test runs, which says more than the test.
func (r *run) hasParts(name string) bool {
	for other := range r.running {
		if strings.HasPrefix(other, name+"/") {
			return true
		}
	}
	return false
}

// summary says how it ended, and whether well. Its last line is the count.
func (r *run) summary() bool {
	section := func(title string, lines []string) {
		if len(lines) > 0 {
			fmt.Fprintf(r.out, "\n%s:\n  %s\n", title, strings.Join(lines, "\n  "))
		}
	}
	section("skipped, as allowed", lines(r.skips))
	section("skipped, and not allowed (in test/allowed-skips)", lines(r.unwanted))
	section("failed", r.failures)
	fmt.Fprintf(r.out, "\n%d passed, %d failed, %d skipped\n", r.passed, r.failed, r.skipped)
	return len(r.failures) == 0 && len(r.unwanted) == 0 && r.passed > 0
}

func lines(skips []skip) (lines []string) {
	for _, s := range skips {
		lines = append(lines, fmt.Sprintf("%s %s: %s", s.folder, s.test, s.reason))
	}
	return lines
}
