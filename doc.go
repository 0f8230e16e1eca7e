// Package millrace is the root of the module and holds no code of its own: the
// tests beside this file keep the rules that all folders share (which folder may
// import which, what is documented, how long a function may be).
//
// The binary is cmd/millrace.
package millrace
