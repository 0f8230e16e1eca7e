package main

import (
	"strings"
	"testing"
	"time"
)

// events are what go test -json writes about a package of three tests, and
// about one that does not build.
const events = `
{"Action":"run","Package":"m/a","Test":"TestOne"}
{"Action":"output","Package":"m/a","Test":"TestOne","Output":"=== RUN   TestOne\n"}
{"Action":"output","Package":"m/a","Test":"TestOne","Output":"    a_test.go:3: it rains\n"}
{"Action":"OUTCOME","Package":"m/a","Test":"TestOne"}
{"Action":"run","Package":"m/a","Test":"TestTwo/by_night"}
{"Action":"output","Package":"m/a","Test":"TestTwo/by_night","Output":"    a_test.go:9: needs a moon\n"}
{"Action":"skip","Package":"m/a","Test":"TestTwo/by_night"}
{"Action":"output","Package":"m/a","Output":"ok  \tm/a\t0.1s\n"}
{"Action":"PACKAGE","Package":"m/a"}
`

func replay(text, allowed string) (*run, string, bool) {
	var out strings.Builder
	r := &run{out: &out, allowed: parseAllowed(allowed), running: map[string]time.Time{}, output: map[string]*strings.Builder{}}
	r.read(strings.NewReader(text))
	well := r.summary()
	return r, out.String(), well
}

func TestSkipsMustBeAllowed(t *testing.T) {
	passing := strings.NewReplacer("OUTCOME", "pass", "PACKAGE", "pass").Replace(events)
	for _, row := range []struct {
		allowed string
		well    bool
	}{
		{"", false},
		{"m/a TestTwo/by_night needs a moon", true},
		{"# all nights\n* TestTwo/* needs a moon # or a lamp", true},
		{"* * needs a moon", true},
		{"m/a TestTwo needs a moon", false},
		{"m/b * needs a moon", false},
		{"m/a TestTwo/by_night needs a lamp", false},
		{"m/a TestTwo/by_night", false}, // no reason given
	} {
		_, out, well := replay(passing, row.allowed)
		if well != row.well {
			t.Errorf("allowed %q: ended well is %v\n%s", row.allowed, well, out)
		}
		if !strings.HasSuffix(out, "\n1 passed, 0 failed, 1 skipped\n") || !strings.Contains(out, "ok  \tm/a") {
			t.Errorf("the count or the package's line is missing:\n%s", out)
		}
		if strings.Contains(out, "it rains") {
			t.Errorf("a test that passed is shown:\n%s", out)
		}
	}
}

func TestFailuresAreShown(t *testing.T) {
	failing := strings.NewReplacer("OUTCOME", "fail", "PACKAGE", "fail").Replace(events)
	_, out, well := replay(failing, "* * needs a moon")
	if well || !strings.Contains(out, "it rains") || !strings.HasSuffix(out, "\n0 passed, 1 failed, 1 skipped\n") {
		t.Errorf("ended well is %v:\n%s", well, out)
	}
}

func TestWhatPanicsIsShown(t *testing.T) {
	const broken = `{"Action":"run","Package":"m/a","Test":"TestThree"}
{"Action":"output","Package":"m/a","Test":"TestThree","Output":"panic: no moon\n"}
{"Action":"output","Package":"m/a","Output":"FAIL\tm/a\t0.1s\n"}
{"Action":"fail","Package":"m/a"}
`
	_, out, well := replay(broken, "")
	if well || !strings.Contains(out, "panic: no moon") || !strings.Contains(out, "m/a TestThree (did not end)") {
		t.Errorf("ended well is %v:\n%s", well, out)
	}
}

func TestNotBuildingIsAFailure(t *testing.T) {
	const broken = `{"ImportPath":"m/c","Action":"build-output","Output":"c.go:1: syntax error\n"}
{"ImportPath":"m/c","Action":"build-fail"}
{"Action":"output","Package":"m/c","Output":"FAIL\tm/c [build failed]\n"}
{"Action":"fail","Package":"m/c","FailedBuild":"m/c"}
`
	passing := strings.NewReplacer("OUTCOME", "pass", "PACKAGE", "pass").Replace(events)
	_, out, well := replay(passing+broken, "* * needs a moon")
	if well || !strings.Contains(out, "syntax error") || !strings.Contains(out, "m/c [build failed]") {
		t.Errorf("ended well is %v:\n%s", well, out)
	}
}

func TestNothingTestedIsAFailure(t *testing.T) {
	if _, out, well := replay("", ""); well {
		t.Errorf("no test at all ended well:\n%s", out)
	}
}
